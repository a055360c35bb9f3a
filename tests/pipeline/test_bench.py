"""bench at toy size: every part says what it measured, goals are judged by their ratio, nothing of it stays."""

import json

import numpy as np
import pytest
import torch

from data.tokens.reader import TokenReader
from pipeline.__main__ import main
from pipeline.bench.figures import Figure, line_of, shortened, speeds
from pipeline.bench.prior import peak_of
from pipeline.bench.tokens import size_of
from pipeline.config import load_config
from pipeline.text_tokens import TextTokensRequest, cache_text


def test_speeds_are_amounts_over_seconds_and_ratios_of_neighbours(monkeypatch):
    clock = [0.0]

    def taking(seconds):
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    monkeypatch.setattr("stages.measures.ladder.time.perf_counter", lambda: clock[0])
    tasks = {"slow": taking(0.02), "fast": taking(0.005)}
    slow, fast = speeds("part", tasks, 10, "things/s", 3, {"fast": ("slow", (">=", 2.0))})
    assert slow.value == pytest.approx(500) and fast.value == pytest.approx(2000)
    assert fast.spread[0] <= fast.value <= fast.spread[1]
    assert slow.ratio is None and slow.met is None and fast.ratio == pytest.approx(4)
    assert fast.met and "x slow  (goal >= 2: met)" in line_of(fast)


@pytest.mark.parametrize(
    ("value", "ratio", "goal", "met"),
    [
        (5.0, 2.9, (">=", 3.0), False),
        (5.0, 3.0, (">=", 3.0), True),
        (0.01, None, ("<=", 0.02), True),
        (0.03, None, ("<=", 0.02), False),
        (0.03, None, None, None),
    ],
)
def test_goals_are_of_the_ratio_where_there_is_one(value, ratio, goal, met):
    figure = Figure("part", "name", value, "unit", ratio=ratio, against="other" if ratio else "", goal=goal)
    assert figure.met is met and figure.to_dict().get("met") is met


def test_large_numbers_are_shortened():
    assert [shortened(value) for value in (0.01234, 9876.0, 12345.0, 5.4e6)] == ["0.01234", "9876", "12.35k", "5.4M"]


def test_the_peak_is_what_the_fastest_product_reaches(monkeypatch):
    monkeypatch.setattr("pipeline.bench.prior.PEAK_SIDE", 16)
    clock = iter([0.0, 3.0, 5.0, 5.5, 7.0, 8.0])
    monkeypatch.setattr("pipeline.bench.prior.time.perf_counter", lambda: next(clock))
    assert peak_of(torch.float32, torch.device("cpu"), runs=3) == 2 * 16**3 / 0.5


def test_bytes_of_a_cache_leave_out_names_alone(tmp_path):
    """100 tokens of a byte and a label of eight; what names take is known from the names."""
    (tmp_path / "text.bin").write_bytes(np.random.default_rng(0).bytes(400 * 100))
    config = load_config("demo", [f"tokens.path={tmp_path}/tokens"])
    cache_text(config, TextTokensRequest(file=str(tmp_path / "text.bin"), length=100, held_out=0.25))
    stored = sum(path.stat().st_size for path in (tmp_path / "tokens").rglob("*.tar"))
    for split in ("train", "val"):
        reader = TokenReader(tmp_path / "tokens", split)
        for start in range(0, len(reader), 16):
            names = reader.keys(np.arange(start, min(start + 16, len(reader))))
            size = len(json.dumps(names, separators=(",", ":")))
            stored -= 512 + -(-size // 512) * 512
    figure = size_of(tmp_path / "tokens")
    assert figure.value == stored / 400 and figure.ratio == pytest.approx(stored / 400 / 108) and not figure.met


def test_all_parts_of_a_toy_are_measured_and_nothing_stays(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.bench.transforms.SHAPE", (2, 3, 32, 32))
    monkeypatch.setattr("pipeline.bench.tokens.READ_SAMPLES", 300)
    monkeypatch.setattr("pipeline.bench.prior.PEAK_SIDE", 64)
    monkeypatch.setattr("pipeline.bench.prior.SAMPLES", 2)
    monkeypatch.setattr("pipeline.bench.prior.MANY", 3)
    out = tmp_path / "bench.json"
    assert main(["bench", str(tiny), f"run={tmp_path}/run", "repeats=1", f"out={out}"]) == 0
    found = json.loads(out.read_text())
    by_part = {}
    for figure in found["figures"]:
        by_part.setdefault(figure["part"], {})[figure["name"]] = figure
        assert figure["value"] > 0 or figure["name"].startswith("waiting")
    assert list(by_part) == ["transforms", "tokenizer", "training", "cache", "reader", "prior", "sampling"]
    # the toy has no perceptual loss
    arms = ["pixels alone", "and adversarial", "waiting for data (and adversarial)"]
    assert list(by_part["training"]) == arms
    for name in ("with cache again", "Hugging Face's Llama", "by full passes"):
        assert name in by_part["sampling"]
    for batch in (1, 3):
        scale = by_part["sampling"][f"batch {batch}, scale order, 8+2+1 rounds"]
        # a goal is for 256 tokens, the toy has twelve
        assert scale["against"] == f"batch {batch}, token order" and scale["ratio"] > 0 and "met" not in scale
    assert by_part["cache"]["images to shards"]["against"] == "encoding alone"
    machine = found["machine"]
    assert found["peak_memory_bytes"] > 1e8 and 1 <= machine["usable_cores"] <= machine["cores"] and machine["cpu"]
    assert machine["threads"] >= 1 and machine["instructions"][0] == torch.backends.cpu.get_cpu_capability()
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert all(figure["name"] in printed for figure in found["figures"]) and machine["cpu"] in printed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["repeats=0"], "repeats=0; allowed: 1 or more"),
        (["parts=haar"], "parts=haar; allowed: all, transforms, tokenizer"),
        (["memory=16"], "has no chunks"),
    ],
)
def test_wrong_keys_are_one_line(tmp_path, tiny, capsys, keys, message):
    assert main(["bench", str(tiny), f"run={tmp_path}/run", f"out={tmp_path}/bench.json", *keys]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "bench.json").exists()
