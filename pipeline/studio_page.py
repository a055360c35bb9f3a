"""Page of the studio: three tabs of controls for the actions. Gradio, an extra, is only imported in ``build_page``."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

from data.errors import OctavesError
from pipeline.models import DENSE_ENCODER
from pipeline.report import CREDIT
from pipeline.studio_actions import (
    MAX_COUNT,
    Drawn,
    Studio,
    draw_samples,
    edit_upload,
    mask_cells,
    read_wish,
    seen_upload,
    shown_prefixes,
    upsample_upload,
)
from pipeline.studio_looks import PAINTER, PAINTER_SCRIPT, data_uri, empty, line, pictures

SECONDS_A_SCALE = 0.45
"""How long each number of scales is shown while new images are refined."""
NEW_SEED = "() => Math.floor(Math.random() * 1000000)"
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
"""For events that use the models: users wait for each other."""
ANY_TIME: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
"""For events that only show existing results."""

NO_PREFIXES = (
    "No slider over the scales: this tokenizer's decoder needs all scales at once. Tokenizers trained with "
    "tokenizer.attention=sit-scd or sit-sc can show images being refined."
)
NO_UPSAMPLING = f"Upsampling needs a scale-causal encoder: {DENSE_ENCODER}."
OTHER_ORDER = {
    "interleaved": "This prior samples all scales of a position together, so it cannot be given the first scales.",
    "luma_first": "This prior samples luma before chroma, so it must be given all of the luma (octaves colorize).",
    "reversed": "This prior samples the last tokens first, so it cannot be given the first scales.",
}
NO_FREEZING = f"Keeping whole scales needs a scale-causal encoder: {DENSE_ENCODER}."


def build_page(studio: Studio) -> Any:
    """The page as gradio.Blocks, ready to be queued and launched."""
    import gradio as gr

    config = studio.config
    # uploads are deleted after an hour
    with gr.Blocks(title=config.name, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        _html(gr, f"<h1>{escape(config.name)}</h1><p>{escape(_summary(studio))}</p>", elem_id="head")
        with gr.Tab("Sample"):
            _sample_tab(gr, studio)
        with gr.Tab("Upsample"):
            _upsample_tab(gr, studio)
        with gr.Tab("Edit"):
            _edit_tab(gr, studio)
        _html(gr, line(_footer(studio), "foot"))
    return page


def _sample_tab(gr: Any, studio: Studio) -> None:
    layout, num_scales = studio.models.prior.layout, studio.config.sampling.scales
    num_scales = num_scales or len(layout.scales)
    growing = layout.decodes_prefixes and num_scales > 1
    numbers = shown_prefixes(layout, num_scales)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            controls, submits = _controls(gr, studio, 8, any_first=False)
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=3, min_width=300):
            with gr.Row(visible=growing):
                slider = gr.Slider(
                    1,
                    len(numbers),
                    len(numbers),
                    step=1,
                    label="scales" if len(numbers) == num_scales else "prefix",
                    elem_id="scales",
                    buttons=[],
                    scale=5,
                    min_width=200,
                )
                again = gr.Button(
                    "Watch them grow", size="sm", elem_id="grow", scale=1, min_width=140, elem_classes="beside"
                )
            reach = _html(gr, line(_reach(studio, num_scales), "reach"), visible=growing, elem_id="reach")
            view = _html(gr, empty("New images appear here."), elem_id="samples")
            if not layout.decodes_prefixes:
                _html(gr, line(NO_PREFIXES))
    drawn = gr.State(None)

    def draw(*values: Any, progress: Any = gr.Progress()) -> tuple[Drawn, str]:  # noqa: B008 (gradio's way)
        samples = draw_samples(studio, read_wish(*values), _tell(progress))
        return samples, pictures(samples.shown(0))

    def grow(samples: Drawn | None) -> Iterator[tuple[int, str, str]]:
        for step in range(len(samples.steps) if samples else 0):
            yield show(samples, step + 1)
            time.sleep(SECONDS_A_SCALE)

    def show(samples: Drawn | None, position: Any) -> tuple[int, str, str]:
        if samples is None:
            number = numbers[int(position) - 1]
            return int(position), line(_reach(studio, number), "reach"), empty("Draw some images first.")
        step = min(max(1, int(position)), len(samples.steps)) - 1
        number = samples.steps[step][0]
        return step + 1, line(_reach(studio, number), "reach"), pictures(samples.shown(step))

    def look(samples: Drawn | None, position: Any) -> tuple[str, str]:
        return show(samples, position)[1:]

    done = gr.on(
        [button.click, *submits],
        answered(gr, draw),
        controls,
        [drawn, view],
        show_progress_on=[view],
        **ONE_AT_A_TIME,
    )
    if growing:
        done.success(grow, drawn, [slider, reach, view], **ANY_TIME)
        again.click(grow, drawn, [slider, reach, view], trigger_mode="once", **ANY_TIME)
        slider.input(look, [drawn, slider], [reach, view], trigger_mode="always_last", **ANY_TIME)


def _upsample_tab(gr: Any, studio: Studio) -> None:
    layout = studio.models.tokenizer.layout
    sides = [height for height, _ in layout.rungs]
    if len(sides) < 2 or not studio.models.prior.writes_prefixes:
        _html(gr, line(NO_UPSAMPLING if len(sides) < 2 else OTHER_ORDER[studio.models.prior.order]))
        return
    targets = sides[1:] if layout.encodes_prefixes and layout.decodes_prefixes else sides[-1:]
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            upload = _upload(gr, "upsample-upload")
            with gr.Row():
                start = gr.Dropdown([(f"{s} px", s) for s in sides[:-1]], value=sides[-2], label="from", min_width=90)
                stop = gr.Dropdown([(f"{s} px", s) for s in targets], value=sides[-1], label="to", min_width=90)
            _html(gr, line("A larger image is first reduced to “from” by averaging."))
            controls, submits = _controls(gr, studio, 4, any_first=True)
            button = gr.Button("Upsample", variant="primary", elem_id="upsample")
        with gr.Column(scale=3, min_width=300):
            view = _html(gr, empty("Upload an image: the prior enlarges it to the chosen size."), elem_id="upsampled")
            note = _html(gr, "", elem_id="agreement")

    def upsample(path: Any, small: Any, large: Any, *values: Any, progress: Any = gr.Progress()) -> tuple[str, str]:  # noqa: B008
        shown, about = upsample_upload(studio, path, small, large, read_wish(*values), _tell(progress))
        return pictures(shown), line(about)

    gr.on(
        [button.click, *submits],
        answered(gr, upsample),
        [upload, start, stop, *controls],
        [view, note],
        show_progress_on=[view],
        **ONE_AT_A_TIME,
    )


def _edit_tab(gr: Any, studio: Studio) -> None:
    layout, cells = studio.models.tokenizer.layout, mask_cells(studio)
    num_scales = len(layout.scales)
    natural = studio.models.prior.writes_prefixes
    max_frozen = num_scales - 1 if layout.keeps_prefixes and natural else 0
    if not max_frozen:
        _html(
            gr,
            line(
                (NO_FREEZING if natural else OTHER_ORDER[studio.models.prior.order])
                + (" The painted area can still be sampled again." if cells else "")
            ),
        )
    if not max_frozen and not cells:
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            upload = _upload(gr, "edit-upload")
            # an update replaces all props of the component
            hint = "Paint what may change" + ("; with nothing painted, everything may." if max_frozen else ".")
            props = {"cells": cells, "hint": hint}
            painter = _html(
                gr,
                "",
                html_template=PAINTER,
                js_on_load=PAINTER_SCRIPT,
                picture="",
                **props,
                elem_id="painter",
                visible=False,
            )
            frozen = gr.Slider(
                0 if cells else 1,
                max(1, max_frozen),
                min(1, max_frozen),
                step=1,
                label="coarse scales kept",
                visible=max_frozen > 0,
                elem_id="frozen",
                buttons=[],
            )
            controls, submits = _controls(gr, studio, 4, any_first=True)
            button = gr.Button("Edit", variant="primary", elem_id="edit")
        with gr.Column(scale=3, min_width=300):
            changes = "its coarse scales are kept, the fine ones are" if max_frozen else "the painted area is"
            view = _html(gr, empty(f"Upload an image: {changes} sampled again."), elem_id="edited")

    def see(path: Any) -> Any:
        if not path:
            return gr.update(picture="", value="", visible=False, **props)
        return gr.update(picture=data_uri(seen_upload(studio, path)), value="", visible=bool(cells), **props)

    def edit(path: Any, kept: Any, mask: Any, *values: Any, progress: Any = gr.Progress()) -> str:  # noqa: B008
        wish = read_wish(*values)
        return pictures(edit_upload(studio, path, int(kept or 0), str(mask or ""), wish, _tell(progress)))

    upload.change(answered(gr, see), upload, painter, **ANY_TIME)
    gr.on(
        [button.click, *submits],
        answered(gr, edit),
        [upload, frozen, painter, *controls],
        view,
        show_progress_on=[view],
        **ONE_AT_A_TIME,
    )


def _html(gr: Any, text: str, **named: Any) -> Any:
    return gr.HTML(text, apply_default_css=False, **named)


def _controls(gr: Any, studio: Studio, count: int, any_first: bool) -> tuple[list[Any], list[Any]]:
    """(controls in the order of ``read_wish``, events that mean "go"). Controls that the prior ignores are left out."""
    condition, settings = studio.models.prior.condition, studio.config.sampling
    label, text, guidance, submits = gr.State(-1), gr.State(""), gr.State(1.0), []
    if condition.uses_labels:
        names = [(name, index) for index, name in enumerate(studio.models.prior.class_names)]
        choices = [("any", -1), *names] if condition.dropout or condition.uses_text else names
        label = gr.Dropdown(choices, value=-1 if any_first and choices[0][1] == -1 else names[0][1], label="class")
    if condition.uses_text:
        text = gr.Textbox(label="caption", lines=2, max_lines=6, placeholder="what the picture shows")
        submits.append(text.submit)
    count = gr.Slider(1, MAX_COUNT, count, step=1, label="pictures", buttons=[])
    if (condition.uses_labels or condition.uses_text) and condition.dropout:
        guidance = gr.Slider(0, 10, settings.guidance, step=0.1, label="guidance", buttons=[])
    per_scale = len(settings.temperature) > 1
    temperature = gr.Slider(
        0,
        2,
        1.0 if per_scale else settings.temperature[0],
        step=0.05,
        label="temperature, times the run's" if per_scale else "temperature",
        buttons=[],
    )
    with gr.Row():
        seed = gr.Number(0, label="seed", precision=0, min_width=110, scale=2)
        fresh = gr.Button("New seed", size="sm", min_width=80, scale=1, elem_classes="beside")
    fresh.click(None, None, seed, js=NEW_SEED, api_visibility="private")
    return [label, text, count, guidance, temperature, seed], submits


def _upload(gr: Any, name: str) -> Any:
    """An input for one image. Gradio's own Image would decode it before its size can be checked."""
    return gr.File(label="picture", file_count="single", type="filepath", height=130, elem_id=name)


def answered(gr: Any, action: Callable[..., Any]) -> Callable[..., Any]:
    """``action`` with errors as one line in the page: OctavesError with its message, other errors without details."""

    @functools.wraps(action)
    def run(*values: Any, **named: Any) -> Any:
        try:
            return action(*values, **named)
        except OctavesError as error:
            message, title = str(error), "That does not work"
        except Exception:
            traceback.print_exc()
            message, title = "A bug in the studio; see the terminal where it was started.", "Error"
        # the message is displayed as HTML and may contain user input
        raise gr.Error(escape(message), title=title, print_exception=False)

    return run


def _tell(progress: Any) -> Callable[[float], None]:
    return lambda share: progress(share, desc="drawing")


def _reach(studio: Studio, number: int) -> str:
    layout = studio.models.prior.layout
    scale = layout.scales[number - 1]
    tokens = f"{layout.prefix_length(number)} tokens" if layout.ends == "fixed" else f"down to {scale.name}"
    return f"{number} of {len(layout.scales)} scales · {scale.image_size[0]} px · {tokens}"


def _summary(studio: Studio) -> str:
    layout = studio.models.prior.layout
    side = layout.image_size[0]
    most = "" if layout.ends == "fixed" else "at most "
    return f"Pictures of {side} x {side} pixels from {most}{layout.length} tokens in {len(layout.scales)} scales."


def _footer(studio: Studio) -> str:
    config, models = studio.config, studio.models
    attention = getattr(config.tokenizer, "attention", "")
    parts = [
        config.run,
        f"tokenizer {config.tokenizer.kind}{' ' + attention if attention else ''}, {_size(models.tokenizer)}",
        f"prior {config.prior.kind}, {_size(models.prior)}",
    ]
    return " · ".join(parts) + (f" · {CREDIT}" if config.images.kind == "demo" else "")


def _size(module: Any) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M parameters"
