"""What eval says of scales: the ladder of resolutions, upsampling and editing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pipeline.edit import edit_pixels
from pipeline.errors import RunError
from pipeline.evaluate import evaluate
from pipeline.upsample import upsample_pixels
from stages.conditions.encoders import WordEncoder
from stages.conditions.text import TextConditionConfig
from stages.factory import build_prior
from stages.measures.reconstruction import reconstruct
from stages.weights import WeightsError, file_sha256, load_tokenizer, save_prior
from tests.pipeline.toy_evaluation import CLASSES, held_out_of, mean_psnr, models_of, read, toy_run, write_baseline


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
    tmp_path: Path, bright_and_dark: Path, attention: str, keys: dict, message: str
) -> None:
    config = toy_run(tmp_path, bright_and_dark, with_prior=True, attention=attention)
    if "baseline" in keys:
        write_baseline(tmp_path / "other.safetensors", size=32)
        keys = {"baseline": str(tmp_path / keys["baseline"])}
    for key, value in keys.items():
        setattr(config.eval, key, value)
    with pytest.raises((RunError, WeightsError), match=message):
        evaluate(config)
    assert not (tmp_path / "eval").exists()


def test_a_text_prior_edits_with_captions_and_reads_them_for_upsampling(
    tmp_path: Path, bright_and_dark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioned = tmp_path / "captioned"
    shutil.copytree(bright_and_dark, captioned)
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


def test_without_a_classifier_or_prior_editing_is_named_as_skipped(tmp_path: Path, bright_and_dark: Path) -> None:
    config = toy_run(tmp_path, bright_and_dark, with_prior=True, attention="sit-sc")
    config.eval.edit_frozen, config.eval.classifier, config.eval.timing_repeats = [1], False, 0
    metrics = read(evaluate(config))
    assert "editing" not in metrics and "sampling_time" not in metrics["ladder"]
    assert "editing: there is no classifier to judge it" in metrics["skipped"]
    Path(config.prior.path).unlink()
    metrics = read(evaluate(config))
    assert len(metrics["ladder"]["rungs"]) == 2
    assert any(line.startswith("upsampling, editing and colouring") for line in metrics["skipped"])
