"""eval on a toy run: what it writes, what it refuses, and a report that needs nothing from outside."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter

from data.images.reading import pixels_of
from data.images.sources import open_source
from pipeline import evaluate as evaluation
from pipeline import evaluate_samples
from pipeline.errors import RunError
from pipeline.evaluate import evaluate, fit_classifier
from pipeline.evaluate_samples import decoded_thumbnails, kept_thumbnails, save_samples
from pipeline.evaluation_images import Images, read_images
from pipeline.report_curves import panels_of, read_scalars, smoothed
from stages import factory
from stages.factory import build_prior, build_tokenizer
from stages.measures.classifier import Classifier, train_classifier
from stages.measures.reconstruction import reconstruct
from stages.weights import WeightsError, file_sha256, load_tokenizer, save_prior, save_tokenizer
from tests.pipeline.mean_colour import MeanColourConfig
from tests.pipeline.toy_evaluation import CLASSES, held_out_of, mean_psnr, models_of, read, toy_run

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


class References(HTMLParser):
    """All that a page would fetch, and the pictures inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]


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


def test_inceptions_weights_are_a_file_or_refused(tmp_path: Path, bright_and_dark: Path) -> None:
    config = toy_run(tmp_path, bright_and_dark, with_prior=False)
    config.eval.inception = str(tmp_path / "nowhere.pth")
    with pytest.raises(RunError, match=r"eval.inception=.*nowhere.pth: no such file"):
        evaluate(config)
    Path(config.eval.inception).write_bytes(b"no weights")
    metrics = read(evaluate(config))
    assert any("holds no weights of Inception" in line for line in metrics["skipped"])


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


def test_without_a_prior_the_tokenizer_is_evaluated_alone(tmp_path: Path, bright_and_dark: Path) -> None:
    config = toy_run(tmp_path, bright_and_dark, with_prior=False)
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


def test_without_a_classifier_its_measures_are_named_as_skipped(tmp_path: Path, bright_and_dark: Path) -> None:
    config = toy_run(tmp_path, bright_and_dark, with_prior=True)
    config.eval.classifier = False
    metrics = read(evaluate(config))
    assert "class_accuracy" not in metrics["samples"] and "coverage_lite0" in metrics["samples"]
    assert any("eval.classifier is off" in line for line in metrics["skipped"])


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, bright_and_dark: Path) -> None:
    config = toy_run(tmp_path, bright_and_dark, with_prior=True)
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
    tmp_path: Path, bright_and_dark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the samples are training images as the tokenizer decodes them, half are noise: the share is one half."""
    line = ("tests.pipeline.mean_colour:MeanColourConfig", "tests.pipeline.mean_colour:MeanColour")
    monkeypatch.setitem(factory.TOKENIZERS, "mean-colour", line)
    config = toy_run(tmp_path, bright_and_dark, with_prior=False)
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


def test_training_images_are_decoded_once_for_each_tokenizer(tmp_path, bright_and_dark, monkeypatch):
    config = toy_run(tmp_path, bright_and_dark, with_prior=False)
    source, indices, cpu = open_source(config.images, "train"), [3, 1, 2], torch.device("cpu")
    tokenizer, _ = load_tokenizer(config.tokenizer.path)
    decodings: list[int] = []

    def decoded(*arguments):
        decodings.append(len(arguments[2]))
        return decoded_thumbnails(*arguments)

    monkeypatch.setattr(evaluate_samples, "decoded_thumbnails", decoded)
    first, again = (kept_thumbnails(tokenizer, source, indices, config, cpu) for _ in range(2))
    assert torch.equal(again, decoded_thumbnails(tokenizer, source, indices, config, cpu)) and len(decodings) == 1
    kept_thumbnails(tokenizer, source, indices[::-1], config, cpu)
    tokenizer.precision = "bf16"
    kept_thumbnails(tokenizer, source, indices, config, cpu)
    assert len(decodings) == 3
    # a damaged file, and another tokenizer under the same name
    kept = tmp_path / "eval" / "train_as_decoded.npz"
    kept.write_bytes(kept.read_bytes()[:-100])
    tokenizer.precision = None
    assert torch.equal(kept_thumbnails(tokenizer, source, indices, config, cpu), first)
    save_tokenizer(Path(config.tokenizer.path), tokenizer, config.tokenizer, {"steps": 1})
    kept_thumbnails(tokenizer, source, indices, config, cpu)
    assert len(decodings) == 5


def test_the_classifier_is_trained_once_for_the_same_images_and_settings(tmp_path, bright_and_dark, monkeypatch):
    config = toy_run(tmp_path, bright_and_dark, with_prior=False)
    train = read_images(open_source(config.images, "train"), config.images, 100, small=True)
    trainings: list[int] = []

    def counted(*arguments):
        trainings.append(arguments[3])
        return train_classifier(*arguments)

    monkeypatch.setattr(evaluation, "train_classifier", counted)

    def fit(images: Images) -> Classifier:
        found = fit_classifier(config, images, 2, torch.device("cpu"), [])
        assert found is not None
        return found

    first, again = fit(train), fit(train)
    assert len(trainings) == 1 and torch.equal(first.features(train.pixels), again.features(train.pixels))
    fit(dataclasses.replace(train, labels=1 - train.labels))
    config.eval.classifier_steps += 1
    fit(train)
    config.eval.seed += 1
    fit(train)
    assert len(trainings) == 4
    # a damaged file, and a folder that takes no files
    kept = tmp_path / "eval" / "classifier.npz"
    kept.write_bytes(kept.read_bytes()[:-100])
    fit(train)
    assert len(trainings) == 5
    kept.unlink()
    kept.mkdir()
    fit(train)
    assert len(trainings) == 6
