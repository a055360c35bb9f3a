"""eval on a toy run: what it writes, what it refuses, and a report that needs nothing from outside."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter

from data.images.config import ImagesConfig
from data.images.module import validation_indices
from data.images.reading import pixels_of
from data.images.sources import open_source
from pipeline.config import Config, load_config
from pipeline.edit import edit_pixels
from pipeline.evaluate import evaluate
from pipeline.evaluate_samples import save_samples
from pipeline.evaluation_images import read_images
from pipeline.models import Models, load_models
from pipeline.report_curves import panels_of, read_scalars, smoothed
from pipeline.run import RunError
from pipeline.upsample import upsample_pixels
from stages import factory
from stages.conditions.encoders import WordEncoder
from stages.conditions.labels import ClassConditionConfig
from stages.conditions.text import TextConditionConfig
from stages.factory import build_prior, build_tokenizer
from stages.measures.config import EvalConfig
from stages.measures.reconstruction import reconstruct
from stages.prior.sampling import SamplingConfig
from stages.prior.transformer import TransformerPriorConfig
from stages.tokenizer.quantizers import FSQConfig
from stages.tokenizer.sit import SIT, SITConfig, ViTVQGANConfig
from stages.tokenizer.transformer import TransformerConfig
from stages.weights import WeightsError, file_sha256, load_tokenizer, save_prior, save_tokenizer
from tests.pipeline.mean_colour import MeanColourConfig

CLASSES = ["bright", "dark"]
PICTURES = (
    "reconstructions",
    "extremes",
    "errors",
    "prefixes",
    "frequencies",
    "calibration",
    "samples",
    "growing",
    "neighbours",
    "tokens",
    "curves",
    "upsampling",
    "editing",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 training and 8 held-out pictures."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 8)):
        for index, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 128, (16, 16, 3)) + (128 if index == 0 else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


def toy_run(folder: Path, images: Path, with_prior: bool, attention: str = "sit-scd") -> Config:
    """A run with an untrained tokenizer and, where asked, an untrained prior of its tokens."""
    width = TransformerConfig(depth=1, width=16, heads=2)
    tokenizer_config = SITConfig(
        path=str(folder / "tokenizer/tokenizer.safetensors"),
        scales=2,
        patch=4,
        attention=attention,
        encoder=width,
        decoder=width,
        quantizer=FSQConfig(levels=[3, 3]),
    )
    config = Config(
        name="toy",
        run=str(folder),
        images=ImagesConfig(kind="folder", path=str(images), size=16),
        tokenizer=tokenizer_config,
        condition=ClassConditionConfig(),
        prior=TransformerPriorConfig(path=str(folder / "prior/prior.safetensors"), depth=1, width=16, heads=2),
        eval=EvalConfig(num_images=16, num_samples=6, batch_size=4, classifier_steps=5, neighbours=2),
    )
    config.tokens.path = str(folder / "tokens")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(tokenizer_config, (16, 16), 3)
    path = Path(tokenizer_config.path)
    save_tokenizer(path, tokenizer, tokenizer_config, {"perceptual": "lite0"})
    if with_prior:
        prior = build_prior(config.prior, config.condition, tokenizer.layout, CLASSES)
        extra = {"tokenizer_sha256": file_sha256(path)}
        save_prior(Path(config.prior.path), prior, config.prior, config.condition, extra)
    return config


def write_baseline(path: Path, size: int = 16) -> Path:
    """An untrained raster tokenizer of images of ``size`` px."""
    width = TransformerConfig(depth=1, width=16, heads=2)
    config = ViTVQGANConfig(patch=4, encoder=width, decoder=width, quantizer=FSQConfig(levels=[3, 3]))
    torch.manual_seed(2)
    save_tokenizer(path, build_tokenizer(config, (size, size), 3), config, {"perceptual": "none"})
    return path


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


class References(HTMLParser):
    """All that a page would fetch, and the pictures inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    run = tmp_path_factory.mktemp("run")
    config = toy_run(run, images, with_prior=True, attention="sit-sc")
    config.sampling.guidance = 30.0  # an untrained prior hardly listens
    config.eval = EvalConfig(
        **{
            **vars(config.eval),
            "baseline": str(write_baseline(run / "baseline.safetensors")),
            "timing_repeats": 2,
            "upsample_from": 8,
            "num_upsampled": 6,
            "edit_frozen": [1],
            "num_edited": 5,
        }
    )
    with SummaryWriter(str(run / "tokenizer" / "logs")) as writer:
        for step in range(30):
            writer.add_scalar("loss/pixel", 1 / (step + 1), step)
        writer.add_scalar("validation/psnr", 20, 30)
    return evaluate(config)


def test_everything_is_written_and_every_number_has_its_company(evaluated: Path) -> None:
    names = {path.name for path in evaluated.iterdir()}
    pictures = {f"{name}.png" for name in PICTURES}
    assert names == pictures | {"metrics.json", "report.html", "samples.npz"}
    metrics = read(evaluated)
    samples, rate = metrics["samples"], metrics["rate"]
    # no weights of Inception, and 16 images
    assert [line.split(":")[0] for line in metrics["skipped"]] == ["fid", "R² of tokens from earlier ones"]
    assert len(metrics["settings"]["tokenizer"]["sha256"]) == 64
    assert metrics["settings"]["config"]["eval"]["num_samples"] == 6
    assert (
        metrics["tokenizer"]["fd_lite0"]["too_few_images"] and metrics["tokenizer"]["fd_lite0"]["same_backbone_as_loss"]
    )
    assert {"psnr_mean_of_images", "perceptual_lite0", "prior_bits_per_pixel"} <= set(rate)
    # 2 scales of 4 tokens out of 9 codes, on 256 pixels
    assert rate["fixed_length_bits_per_pixel"] == pytest.approx(8 * np.log2(9) / 256)
    assert samples["fd_lite0_of_real_images"]["num_judged"] == 6
    assert set(samples["class_accuracy"]) >= {"total", "balanced", "per_class", "baseline_held_out"}
    assert 0 <= samples["coverage_classifier"]["baseline_of_real_images"] <= 1
    assert [entry["num_scales"] for entry in metrics["tokenizer"]["prefixes"]] == [1, 2]
    # all scales are the image itself
    assert metrics["tokenizer"]["prefixes"][-1]["psnr_mean_of_images"] == pytest.approx(rate["psnr_mean_of_images"])


def test_every_frechet_distance_names_its_few_images_and_its_backbone(evaluated: Path) -> None:
    metrics = read(evaluated)
    found = {key: metrics[part][key] for part in ("tokenizer", "samples") for key in metrics[part] if "fd_" in key}
    assert {"fd_lite0", "sfd_lite0", "fd_classifier", "fd_classifier_of_real_images"} <= set(found)
    for key, entry in found.items():
        assert entry["bias"].endswith("< 2,048: biased; compare only at equal N")
        # the tokenizer's loss was lite0's; the classifier is of the data set
        assert entry["same_backbone_as_loss"] == ("lite0" in key)
    assert metrics["samples"]["fd_lite0"]["bias"].startswith("N = 6 <")
    assert metrics["samples"]["kd_lite0"]["subset_size"] == 3
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert "Samples as a set" in page and "N = 6 &lt; 2,048" in page and "fd_classifier of samples" in page


def test_every_prefix_has_its_distortion_and_its_frequencies(evaluated: Path) -> None:
    metrics = read(evaluated)
    tokenizer, pixels = held_out_of(evaluated)
    first, whole = metrics["tokenizer"]["prefixes"]
    for key in ("psnr_mean_of_images", "ssim", "perceptual_lite0"):
        assert whole[key] == metrics["tokenizer"][key]
    assert whole["fd_lite0"]["value"] == pytest.approx(metrics["tokenizer"]["fd_lite0"]["value"])
    assert first["image_size"] == [8, 8] and "ssim" not in first and first["fd_lite0"]["value"] > 0
    wanted = functional.avg_pool2d(pixels.float(), 2).round()
    tokens = reconstruct(tokenizer, pixels, 4, torch.device("cpu")).tokens
    with torch.inference_mode():
        decoded = ((tokenizer.decode(tokenizer.first_scales(tokens, 1)) + 1) * 127.5).round()
    assert first["psnr_mean_of_images"] == pytest.approx(mean_psnr(decoded, wanted), abs=0.05)
    rows = metrics["spectrum"]["rows"]
    assert [(row["num_scales"], len(row["decoded"])) for row in rows] == [(1, 3), (2, 7)]
    assert rows[1]["wanted"] == [0] * 7
    # the images are noise: averaging two pixels takes much of their power, most at the highest frequency
    assert rows[0]["wanted"][2] < rows[0]["wanted"][0] < 0
    assert "cycles a side" in (evaluated / "report.html").read_text(encoding="utf-8")


def test_the_priors_calibration_is_that_of_its_own_probabilities(evaluated: Path, tmp_path: Path) -> None:
    found = read(evaluated)["calibration"]
    assert [scale["scale"] for scale in found["scales"]] == [
        scale.name for scale in held_out_of(evaluated)[0].layout.scales
    ]
    models, labels, _ = models_of(evaluated, tmp_path)
    tokenizer, pixels = held_out_of(evaluated)
    tokens = reconstruct(tokenizer, pixels, 4, torch.device("cpu")).tokens
    confidence, hits = torch.zeros(16, 8), torch.zeros(16, 8)
    with torch.inference_mode():
        state = models.prior.begin(models.prompts(labels, [""] * 16), None, 8)
        for position in range(8):
            share, likely = models.prior.logits(state, tokens.ids[:, position, :0]).softmax(-1).max(-1)
            confidence[:, position], hits[:, position] = share, (likely == tokens.ids[:, position, 0]).float()
            models.prior.advance(state, tokens.ids[:, position])
    assert found["confidence_by_position"] == pytest.approx(confidence.mean(0).tolist(), rel=1e-4)
    assert found["accuracy_by_position"] == pytest.approx(hits.mean(0).tolist())
    assert sum(found["bins"]["count"]) == 16 * 8


def test_gray_samples_get_the_three_channels_that_evaluators_take(tmp_path: Path) -> None:
    drawn = torch.arange(2 * 16, dtype=torch.uint8).reshape(2, 1, 4, 4)
    save_samples(tmp_path / "samples.npz", drawn, torch.tensor([0, -1]))
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
        found = arrays["arr_0"]
        assert found.shape == (2, 4, 4, 3) and found.dtype == np.uint8 and not np.isfortran(found)
        assert all((found[..., channel] == drawn[:, 0].numpy()).all() for channel in range(3))


def test_inceptions_weights_are_a_file_or_refused(tmp_path: Path, images: Path) -> None:
    config = toy_run(tmp_path, images, with_prior=False)
    config.eval.inception = str(tmp_path / "nowhere.pth")
    with pytest.raises(RunError, match=r"eval.inception=.*nowhere.pth: no such file"):
        evaluate(config)
    Path(config.eval.inception).write_bytes(b"no weights")
    metrics = read(evaluate(config))
    assert any("holds no weights of Inception" in line for line in metrics["skipped"])


def held_out_of(evaluated: Path) -> tuple[SIT, Tensor]:
    """The tokenizer of an evaluation and its held-out images, uint8 [16, 3, 16, 16], in their order."""
    settings = read(evaluated)["settings"]
    tokenizer, _ = load_tokenizer(Path(settings["tokenizer"]["path"]))
    assert isinstance(tokenizer, SIT)
    images = ImagesConfig(**settings["config"]["images"])
    source = open_source(images, "val")
    return tokenizer, pixels_of(source, validation_indices(len(source), 16, images.split_seed), images)


def models_of(evaluated: Path, tmp_path: Path) -> tuple[Models, list[int], SamplingConfig]:
    """The models of an evaluation, the classes of its held-out images, and how it sampled."""
    (tmp_path / "run.yaml").write_text(json.dumps(read(evaluated)["settings"]["config"]))
    config = load_config(tmp_path / "run.yaml", [])
    val = read_images(open_source(config.images, "val"), config.images, 16)
    return load_models(config), val.labels.tolist(), config.sampling


def mean_psnr(made: Tensor, wanted: Tensor) -> float:
    error = (made.double() - wanted.double()).square().mean((1, 2, 3))
    return float((10 * (255**2 / error).log10()).mean())


def test_the_ladder_has_every_rung_beside_the_baseline(evaluated: Path) -> None:
    metrics = read(evaluated)
    ladder = metrics["ladder"]
    assert [rung["image_size"] for rung in ladder["rungs"]] == [[8, 8], [16, 16]]
    # the last rung is the image itself
    own = ladder["rungs"][-1]["tokenizer"]
    for key in ("psnr_mean_of_images", "ssim", "perceptual_lite0"):
        assert own[key] == metrics["tokenizer"][key]
    assert own["fixed_length_bits_per_pixel"] == pytest.approx(metrics["rate"]["fixed_length_bits_per_pixel"])
    assert own["entropy_bits_per_pixel"] == pytest.approx(metrics["rate"]["entropy_bits_per_pixel"])
    assert own["fd_lite0"]["value"] == pytest.approx(metrics["tokenizer"]["fd_lite0"]["value"], abs=1e-6)
    # the tokenizer was trained against the judge, the baseline was not
    for rung in ladder["rungs"]:
        assert rung["tokenizer"]["fd_lite0"]["same_backbone_as_loss"]
        assert not rung["baseline"]["fd_lite0"]["same_backbone_as_loss"]
        assert set(rung["better"]) == {"psnr", "perceptual_lite0", "fd_lite0"}
    assert ladder["agreement"]["positions"] == 16 * 4
    assert ladder["agreement"]["mismatches"] == ladder["agreement"]["mismatches_that_are_ties"]
    assert len(metrics["settings"]["baseline"]["sha256"]) == 64
    timed = ladder["sampling_time"]
    assert (timed["sequences"], timed["repeats"]) == (4, 2)
    assert [entry["tokens"] for entry in timed["rungs"]] == [4, 8]
    assert timed["rungs"][0]["time_over_tokens"] == pytest.approx(timed["rungs"][0]["share_of_full_time"] / 0.5)
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert "Ladder of resolutions" in page and "8x8, baseline" in page and "Time over tokens" in page


def test_upsampling_stands_beside_bicubic_and_the_bound(evaluated: Path, tmp_path: Path) -> None:
    found = read(evaluated)["upsampling"]
    assert (found["from"], found["to"], found["num_images"]) == (8, 16, 6)
    tokenizer, pixels = held_out_of(evaluated)
    made = reconstruct(tokenizer, pixels, 4, torch.device("cpu")).pixels[:6]
    original = pixels[:6]
    small = functional.avg_pool2d(original.float(), 2).round()
    bicubic = functional.interpolate(small, size=16, mode="bicubic").round().clamp(0, 255)
    for name, result in (("bound_as_decoded", made), ("bicubic", bicubic)):
        assert found["rows"][name]["psnr_mean_of_images"] == pytest.approx(mean_psnr(result, original))
        again = functional.avg_pool2d(result.float(), 2).round()
        assert found["rows"][name]["consistency_psnr"] == pytest.approx(mean_psnr(again, small))
    for row in found["rows"].values():
        assert {"ssim", "perceptual_lite0", "fd_lite0"} <= set(row)
    # what the command would give for each small image, its own class and its own seed
    models, labels, sampling = models_of(evaluated, tmp_path)
    prompts = models.prompts(labels[:6], [""] * 6)
    finished = upsample_pixels(models, small.to(torch.uint8), prompts, sampling, range(6))
    decoded = upsample_pixels(models, small.to(torch.uint8), prompts, sampling, range(6), exact=0, detail=1)
    for name, result in (("upsampled", finished), ("upsampled_as_decoded", decoded)):
        assert found["rows"][name]["psnr_mean_of_images"] == pytest.approx(mean_psnr(result, original))
    assert found["rows"]["bound"]["consistency_psnr"] > found["rows"]["bound_as_decoded"]["consistency_psnr"]
    assert found["prompts"] == "each image's own" and found["seeds"] == [0, 5]


def test_editing_compares_prompts_with_the_bare_reconstruction(evaluated: Path, tmp_path: Path) -> None:
    found = read(evaluated)["editing"]
    assert found["num_images"] == 5
    (entry,) = found["frozen"]
    assert (entry["frozen"], entry["image_size"]) == (1, [8, 8])
    for name in ("before", "own_prompt", "new_prompt"):
        assert 0 <= entry[name]["probability_of_new_class"] <= 1 and 0 <= entry[name]["classified_as_new_class"] <= 1
    tokenizer, pixels = held_out_of(evaluated)
    made = reconstruct(tokenizer, pixels, 4, torch.device("cpu")).pixels[:5]
    small, again = (functional.avg_pool2d(each.float(), 2).round() for each in (pixels[:5], made))
    assert entry["before"]["consistency_psnr"] == pytest.approx(mean_psnr(again, small))
    models, labels, sampling = models_of(evaluated, tmp_path)
    # two classes: the new one is the other one
    for name, asked in (("own_prompt", labels[:5]), ("new_prompt", [1 - label for label in labels[:5]])):
        edited = edit_pixels(models, pixels[:5], 1, models.prompts(asked, [""] * 5), sampling, range(5))
        again = functional.avg_pool2d(edited.float(), 2).round()
        assert entry[name]["consistency_psnr"] == pytest.approx(mean_psnr(again, small))
    assert "decoded only" in (evaluated / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("attention", "keys", "message"),
    [
        ("sit-scd", {"upsample_from": 8}, "eval.upsample_from=8: this tokenizer's encoder sees all scales at once"),
        ("sit", {"edit_frozen": [1]}, "eval.edit_frozen=.1.: this tokenizer's encoder sees all scales at once"),
        ("sit-sc", {"upsample_from": 4}, "eval.upsample_from=4; allowed: 8, or 0"),
        ("sit-sce", {"upsample_from": 16}, "eval.upsample_from=16; allowed: 8, or 0"),
        ("sit-sce", {"edit_frozen": [1, 2]}, "eval.edit_frozen=.1, 2.; allowed: 1 to 1 of the 2 scales"),
        ("sit-sc", {"baseline": "other.safetensors"}, "takes images of 32x32 with 3 channels; allowed: 16x16 with 3"),
        ("sit-sc", {"baseline": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ],
)
def test_what_a_tokenizer_cannot_do_is_refused_before_any_work(
    tmp_path: Path, images: Path, attention: str, keys: dict, message: str
) -> None:
    config = toy_run(tmp_path, images, with_prior=True, attention=attention)
    if "baseline" in keys:
        write_baseline(tmp_path / "other.safetensors", size=32)
        keys = {"baseline": str(tmp_path / keys["baseline"])}
    for key, value in keys.items():
        setattr(config.eval, key, value)
    with pytest.raises((RunError, WeightsError), match=message):
        evaluate(config)
    assert not (tmp_path / "eval").exists()


def test_a_text_prior_edits_with_captions_and_reads_them_for_upsampling(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioned = tmp_path / "captioned"
    shutil.copytree(images, captioned)
    for file in captioned.rglob("*.png"):
        file.with_suffix(".txt").write_text(f"a {file.parent.name} picture")
    config = toy_run(tmp_path, captioned, with_prior=False, attention="sit-sce")
    config.condition = TextConditionConfig()
    layout = load_tokenizer(Path(config.tokenizer.path))[0].layout
    text = WordEncoder(["a", "picture", "bright", "dark"], 4).spec
    prior = build_prior(config.prior, config.condition, layout, CLASSES, text)
    extra = {"tokenizer_sha256": file_sha256(Path(config.tokenizer.path))}
    save_prior(Path(config.prior.path), prior, config.prior, config.condition, extra)
    config.eval.upsample_from, config.eval.edit_frozen, config.eval.num_edited = 8, [1], 4
    shown: list[list[str]] = []
    monkeypatch.setattr("pipeline.evaluate_scales.show_columns", lambda *args: shown.append(list(args[2])))
    metrics = read(evaluate(config))
    assert len(shown[0]) == 4 and set(shown[0]) <= {"a bright picture", "a dark picture"}
    assert metrics["editing"]["num_images"] == 4 and metrics["upsampling"]["prompts"] == "each image's own"
    # the decoder needs all scales: no rungs, no early stop
    assert list(metrics["ladder"]) == ["agreement"]
    assert [line for line in metrics["skipped"] if "ladder of resolutions" in line]


def test_without_a_classifier_or_prior_editing_is_named_as_skipped(tmp_path: Path, images: Path) -> None:
    config = toy_run(tmp_path, images, with_prior=True, attention="sit-sc")
    config.eval.edit_frozen, config.eval.classifier, config.eval.timing_repeats = [1], False, 0
    metrics = read(evaluate(config))
    assert "editing" not in metrics and "sampling_time" not in metrics["ladder"]
    assert "editing: there is no classifier to judge it" in metrics["skipped"]
    Path(config.prior.path).unlink()
    metrics = read(evaluate(config))
    assert len(metrics["ladder"]["rungs"]) == 2
    assert any(line.startswith("upsampling, editing and colouring") for line in metrics["skipped"])


def test_samples_are_bytes_with_labels_in_equal_shares(evaluated: Path) -> None:
    with np.load(evaluated / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (6, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [0, 1, 0, 1, 0, 1]


def test_report_fetches_nothing_and_its_pictures_decode(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    parser = References()
    parser.feed(page)
    assert len(parser.found) == len(PICTURES)
    for reference in parser.found:
        assert reference.startswith("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(reference.partition(",")[2]))) as picture:
            picture.load()
            assert min(picture.size) > 90
    assert not re.search(r"https?://|url\(|@import|<script", page)
    assert "bright" in page and "Twemoji" not in page


def test_without_a_prior_the_tokenizer_is_evaluated_alone(tmp_path: Path, images: Path) -> None:
    config = toy_run(tmp_path, images, with_prior=False)
    config.images.size = 32
    with pytest.raises(RunError, match="16x16"):
        evaluate(config)
    config.images.size = 16
    folder = evaluate(config)
    metrics = read(folder)
    assert "samples" not in metrics and metrics["rate"]["prior_bits_per_pixel"] is None
    assert any("no prior" in line for line in metrics["skipped"])
    assert not (folder / "samples.npz").exists()
    assert "tokenizer alone" in (folder / "report.html").read_text()


def test_without_a_classifier_its_measures_are_named_as_skipped(tmp_path: Path, images: Path) -> None:
    config = toy_run(tmp_path, images, with_prior=True)
    config.eval.classifier = False
    metrics = read(evaluate(config))
    assert "class_accuracy" not in metrics["samples"] and "coverage_lite0" in metrics["samples"]
    assert any("eval.classifier is off" in line for line in metrics["skipped"])


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, images: Path) -> None:
    config = toy_run(tmp_path, images, with_prior=True)
    config.sampling.scales = 1
    with pytest.raises(RunError, match="sampling.scales"):
        evaluate(config)
    config.sampling.scales = 0
    prior = build_prior(config.prior, config.condition, load_tokenizer(config.tokenizer.path)[0].layout, ["a", "b"])
    extra = {"tokenizer_sha256": file_sha256(Path(config.tokenizer.path))}
    save_prior(Path(config.prior.path), prior, config.prior, config.condition, extra)
    with pytest.raises(RunError, match="classes a, b"):
        evaluate(config)
    torch.manual_seed(1)
    save_tokenizer(Path(config.tokenizer.path), build_tokenizer(config.tokenizer, (16, 16), 3), config.tokenizer)
    with pytest.raises(WeightsError, match="another tokenizer"):
        evaluate(config)
    Path(config.tokenizer.path).unlink()
    with pytest.raises(RunError, match="train-tokenizer"):
        evaluate(config)


def test_curves_join_the_files_of_a_resumed_run(tmp_path: Path) -> None:
    for part, steps in enumerate((range(0, 6), range(4, 10))):
        with SummaryWriter(str(tmp_path / "logs"), filename_suffix=f".{part}") as writer:
            for step in steps:
                writer.add_scalar("loss/pixel", step + 100 * part, step)
                writer.add_scalar("gradient_norm", 1, step)
    scalars = read_scalars(tmp_path)
    steps, values = scalars["loss/pixel"]
    assert steps == list(range(10)) and values[:4] == [0, 1, 2, 3] and values[4:] == [104, 105, 106, 107, 108, 109]
    assert panels_of(scalars) == {"loss/pixel": ["loss/pixel"]}
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)


def test_copies_of_training_images_are_seen_through_the_tokenizers_own_error(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the samples are training images as the tokenizer decodes them, half are noise: the share is one half."""
    line = ("tests.pipeline.mean_colour", "MeanColourConfig", "MeanColour")
    monkeypatch.setitem(factory.TOKENIZERS, "mean-colour", line)
    config = toy_run(tmp_path, images, with_prior=False)
    config.tokenizer = MeanColourConfig(path=config.tokenizer.path, steps=64)
    config.eval.num_samples = 8
    tokenizer = build_tokenizer(config.tokenizer, (16, 16), 3)
    save_tokenizer(Path(config.tokenizer.path), tokenizer, config.tokenizer)
    prior = build_prior(config.prior, config.condition, tokenizer.layout, CLASSES)
    extra = {"tokenizer_sha256": file_sha256(Path(config.tokenizer.path))}
    save_prior(Path(config.prior.path), prior, config.prior, config.condition, extra)
    originals = pixels_of(open_source(config.images, "train"), range(4), config.images)
    copies = reconstruct(tokenizer, originals, 4, torch.device("cpu")).pixels
    noise = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    monkeypatch.setattr("pipeline.models.Models.decode", lambda *args: torch.cat([copies, noise]))
    measured = read(evaluate(config))["samples"]
    assert measured["memorised_as_decoded"]["share"] == 0.5
    assert measured["memorised_in_pixels"]["threshold"] > measured["memorised_as_decoded"]["threshold"]
