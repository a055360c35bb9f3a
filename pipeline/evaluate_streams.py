"""What ``eval`` measures and shows of tokenizers whose tokens are streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from data.layout import TokenLayout, Tokens
from pipeline.config import Config, ConfigError
from pipeline.evaluation_images import Images, prompts_of
from pipeline.evaluation_pictures import NUM_SHOWN, prefix_name, show_samples
from pipeline.models import Models
from stages.contract import Tokenizer
from stages.factory import build_grammar
from stages.measures.pictures import sheet
from stages.measures.reconstruction import Reconstructed
from stages.measures.streams import measure_streams
from stages.prior.sampling import SamplingConfig, check_sampling


def measure_rates(
    config: Config,
    tokenizer: Tokenizer,
    models: Models | None,
    val: Images,
    made: Reconstructed,
    measured: dict[str, Any],
) -> dict[str, Any] | None:
    """Rate beside distortion for every number of scales, in bits for each pixel; None for fixed lengths."""
    layout = tokenizer.layout
    grammar = build_grammar(layout)
    if grammar is None:
        return None
    found = measure_streams(
        grammar,
        len(layout.scales),
        made.tokens,
        tokenizer.header_bits(made.tokens, val.labels),
        config.eval.batch_size,
        None if models is None else models.prior,
        None if models is None else prompts_of(models, val.labels, val.texts),
    )
    num_pixels = layout.image_size[0] * layout.image_size[1]
    psnr = {entry["num_scales"]: entry["psnr_mean_of_images"] for entry in measured["prefixes"]}
    for number, entry in enumerate(found["prefixes"], 1):
        entry |= {"num_scales": number, "name": layout.scales[number - 1].name, "psnr_mean_of_images": psnr.get(number)}
        for kind in ("uniform", "prior"):
            if entry.get(f"{kind}_bits") is not None:
                entry[f"{kind}_bits_per_pixel"] = entry[f"{kind}_bits"] / num_pixels
    return found


def bits_of_scales(streams: dict[str, Any]) -> list[float] | None:
    """The prior's mean bits of each scale; None without a prior, or where it models beginnings only."""
    bits = [scale.get("prior") for scale in streams["scales"]]
    return None if any(each is None for each in bits) else bits


def shown_settings(config: Config, layout: TokenLayout) -> dict[str, SamplingConfig]:
    """The sampling settings of ``eval.grids`` by name. Raises ConfigError or InputError for one that cannot be."""
    found = {}
    for item in config.eval.grids:
        # one change to the defaults, not to the run's own settings: two truncations at once would be neither
        base = OmegaConf.structured(SamplingConfig(guidance=config.sampling.guidance))
        try:
            settings = OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.from_dotlist([item])))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"eval.grids: {item}: {reason}; write it like top_p=[0.6], a key of sampling") from error
        assert isinstance(settings, SamplingConfig)
        check_sampling(settings, layout)
        found["".join(letter for letter in item if letter not in "[] ").replace("=", "_")] = settings
    return found


def show_grids(config: Config, folder: Path, models: Models, class_names: tuple[str, ...]) -> None:
    """A picture of new samples for each entry of ``eval.grids``: ten of every class, or of none."""
    for name, settings in shown_settings(config, models.prior.layout).items():
        count = NUM_SHOWN * max(1, len(class_names))
        labels = torch.arange(count) % len(class_names) if class_names else torch.full((count,), -1)
        seeds = [config.eval.seed + index for index in range(count)]
        drawn = models.decode(models.draw(prompts_of(models, labels, [""] * count), settings, seeds))
        show_samples(folder, drawn, labels, class_names, f"samples_{name}.png")


def show_growing(folder: Path, models: Models, tokens: Tokens) -> None:
    """The first samples, scale by scale, where the decoder can stop."""
    layout = models.tokenizer.layout
    if not layout.decodes_prefixes or len(layout.prefixes) < 2:
        return
    columns = [models.decode(models.tokenizer.first_scales(tokens, k)) for k in layout.prefixes]
    rows = list(zip(*columns, strict=True))
    sheet(rows, column_labels=[prefix_name(layout, k) for k in layout.prefixes]).save(folder / "growing.png")


def show_finished(config: Config, folder: Path, models: Models, val: Images, tokens: Tokens, shown: int = 6) -> None:
    """Held-out images from their first scales on: what was given, and three ends of it that the prior writes."""
    layout = models.tokenizer.layout
    if layout.ends == "fixed":
        return
    rows: list[list[Tensor]] = []
    names: list[str] = []
    kept = [k for k in (len(layout.scales) - 2, len(layout.scales) - 1) if k > 0]
    some = torch.arange(min(shown, len(val)))
    for k in kept:
        prefix = models.tokenizer.first_scales(tokens[some], k)
        if prefix.ids.shape[1] >= models.prior.max_length:
            continue  # nothing is left to be written
        prompts = prompts_of(models, val.labels[some], [val.texts[row] for row in some.tolist()])
        given = models.decode(prefix)
        ends = [
            models.decode(models.draw(prompts, config.sampling, [config.eval.seed + n] * len(some), prefix=prefix))
            for n in range(3)
        ]
        rows += [[val.pixels[i], given[i], *(end[i] for end in ends)] for i in range(len(some))]
        names += [layout.scales[k - 1].name] * len(some)
    if rows:
        sheet(rows, names, ["original", "given", "end 1", "end 2", "end 3"]).save(folder / "finished.png")
