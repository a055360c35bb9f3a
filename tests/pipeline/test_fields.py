"""Tokens of two fields through every command: 2^18 codes of signs, on disk, under a prior, in reports and samples."""

import io
import json
import math
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.images.sources import open_source
from data.images.views import to_float
from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.evaluate_order import measure_order
from pipeline.evaluation_images import read_images
from pipeline.models import load_models
from pipeline.upsample import upsample_pixels
from stages.contract import Prompts
from stages.factory import build_tokenizer
from stages.measures.codes import code_use
from stages.prior.sampling import SamplingConfig
from stages.tokenizer.nested import NestedConfig
from stages.tokenizer.quantizers import ResidualVQConfig
from stages.tokenizer.transformer import TransformerConfig
from tests.conftest import TINY

SIGNS = "quantizer: {kind: lfq, bits: 18}"
EVALUATED = 72


@pytest.fixture(scope="module")
def run(tmp_path_factory, many_images):
    """A run of 18 signs a token, evaluated with two of three scales kept and with the ladder."""
    folder = tmp_path_factory.mktemp("fields")
    text = TINY.format(path=many_images)
    start = text.index("quantizer:")
    (folder / "tiny.yaml").write_text(text[:start] + SIGNS + text[text.index("\n", start) :])
    keys = ["images.val_share=0.8", f"eval.num_images={EVALUATED}", "eval.upsample_from=8", "eval.num_upsampled=4"]
    keys += ["eval.edit_frozen=[1]", "eval.num_edited=2"]
    common = [str(folder / "tiny.yaml"), f"run={folder}/run", *keys]
    for command in ("train-tokenizer", "cache-tokens", "train-prior", "eval"):
        assert main([command, *common]) == 0
    return folder, common


@pytest.fixture(scope="module")
def metrics(run):
    return json.loads((run[0] / "run/eval/default/metrics.json").read_text())


def test_ids_on_disk_are_pairs_of_uint16_below_512(run):
    layout = json.loads((run[0] / "run/tokens/manifest.json").read_text())["layout"]
    for scale in layout["scales"]:
        assert scale["fields"] == [{"name": f"code{n}", "vocabulary_size": 512} for n in (1, 2)]
    (shard,) = sorted((run[0] / "run/tokens/train").glob("*.tar"))
    with tarfile.open(shard) as tar:
        stored = [
            np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar if member.name.endswith(".tokens.npy")
        ]
    assert all(part.dtype == np.uint16 and part.shape[2:] == (12, 2) for part in stored)
    ids = np.concatenate([part.reshape(-1, 2) for part in stored])
    assert ids.max() < 512 and len(np.unique(ids[:, 0])) > 1 and len(np.unique(ids[:, 1])) > 1


def test_the_tokens_evaluated_are_those_of_the_signs(run):
    """Both fields together are 18 bits: decoding them is the reconstruction that training saw."""
    config = load_config(run[1][0], run[1][1:])
    tokenizer = load_models(config).tokenizer
    pixels = to_float(read_images_of(config))
    with torch.no_grad():
        tokens = tokenizer.encode(pixels)
        torch.testing.assert_close(tokenizer.decode(tokens), tokenizer(pixels).reconstruction.clamp(-1, 1))
        codes = tokenizer.codes(tokens)
    assert codes.shape == (len(pixels), 12, 18) and set(codes.unique().tolist()) == {-1.0, 1.0}
    bits = (codes > 0).long()
    fields = (bits.unflatten(-1, (2, 9)) * 2 ** torch.arange(9)).sum(-1)
    assert torch.equal(fields, tokens.ids)


def read_images_of(config):
    return read_images(open_source(config.images, "val"), config.images, 8).pixels


def test_rates_are_summed_over_fields_and_use_is_told_for_each(metrics):
    assert len(metrics["codes"]) == 6 and {use["field"] for use in metrics["codes"]} == {"code1", "code2"}
    for use in metrics["codes"]:
        assert use["vocabulary_size"] == 512 and use["num_tokens"] == 4 * EVALUATED
        assert 1 <= use["perplexity"] <= use["used"] <= 512
    for scale in metrics["rate"]["scales"]:
        mine = [use for use in metrics["codes"] if use["scale"] == scale["scale"]]
        assert scale["tokens_per_image"] == 4 and scale["fixed_length_bits"] == 4 * 18
        assert scale["entropy_bits"] == pytest.approx(4 * sum(math.log2(use["perplexity"]) for use in mine))
    rate = metrics["rate"]
    assert rate["fixed_length_bits_per_pixel"] == 12 * 18 / 256
    # a prior that has learned nothing spends about 18 bits a token, not 9
    assert 9.5 < rate["prior_bits_per_token"] < 18.5
    assert sum(metrics["order"]["bits_by_position"]) == pytest.approx(rate["prior_bits_per_pixel"] * 256)


def test_the_joint_entropy_is_below_the_fields_and_marked_where_tokens_are_few(metrics):
    for joint in metrics["joint_codes"]:
        mine = [use for use in metrics["codes"] if use["scale"] == joint["scale"]]
        assert joint["field_bits"] == pytest.approx(sum(math.log2(use["perplexity"]) for use in mine))
        assert 0 < joint["entropy_bits"] <= min(joint["field_bits"], math.log2(joint["num_tokens"])) + 1e-9
        assert max(use["used"] for use in mine) <= joint["used"] <= joint["num_tokens"]
        assert joint["too_few_tokens"] == (joint["num_tokens"] < 10 * joint["used"])


def test_the_report_tells_fields_apart(run, metrics):
    report = (run[0] / "run/eval/default/report.html").read_text()
    assert "approximation, code1" in report and "detail2, code2" in report and "Joint entropy, bits" in report
    assert metrics["calibration"] and metrics["upsampling"] and metrics["editing"] and metrics["ladder"]
    assert metrics["order"]["causality"]["code_width"] == 18


def test_validation_logs_every_field(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = {path.parent for path in (run[0] / "run/tokenizer").rglob("events*")}
    events = EventAccumulator(str(log))
    events.Reload()
    tags = events.Tags()["scalars"]
    for name in ("loss/entropy", "weighted/entropy", "loss/commitment"):
        assert name in tags
    for prefix in ("codes", "validation/codes"):
        assert {f"{prefix}/perplexity/detail1/code{n}" for n in (1, 2)} <= set(tags)


def test_small_images_give_the_first_pairs_and_samples_keep_them(run):
    config = load_config(run[1][0], run[1][1:])
    models = load_models(config)
    pixels = read_images_of(config)[:3]
    asked = Prompts.of_labels(torch.zeros(3, dtype=torch.int64))
    small = torch.nn.functional.avg_pool2d(to_float(pixels), 2)
    prefix = models.tokenizer.encode(small)
    drawn = models.draw(asked, SamplingConfig(temperature=[0.5], top_k=[3]), range(3), prefix=prefix)
    assert prefix.ids.shape == (3, 8, 2) and torch.equal(drawn.ids[:, :8], prefix.ids)
    alone = models.draw(asked[:1], SamplingConfig(temperature=[0.5], top_k=[3]), [0], prefix=prefix[:1])
    assert torch.equal(alone.ids, drawn.ids[:1])
    made = upsample_pixels(models, (small * 127.5 + 127.5).round().byte(), asked, SamplingConfig(), range(3))
    assert made.shape == (3, 3, 16, 16)


def test_perplexity_by_position_is_one_number_a_token(tmp_path):
    torch.manual_seed(0)
    size = TransformerConfig(1, 32, 4)
    config = NestedConfig(num_tokens=4, patch=8, encoder=size, decoder=size, quantizer=ResidualVQConfig(codes=8))
    tokenizer = build_tokenizer(config, (16, 16), 3).eval()
    pixels = (torch.rand(80, 3, 16, 16) * 255).byte()
    made = SimpleNamespace(tokens=tokenizer.encode(to_float(pixels)))
    uses = code_use(made.tokens, tokenizer.layout)
    device = torch.device("cpu")
    found = measure_order(tmp_path, tokenizer, None, SimpleNamespace(pixels=pixels), made, None, uses, 40, device, [])
    assert len(uses) == 8 and found["causality"]["tokens"] == 4
    assert found["perplexity_by_position"] == pytest.approx(
        [uses[2 * place].perplexity * uses[2 * place + 1].perplexity for place in range(4)]
    )


def test_sample_edit_orders_and_export_take_two_fields(run, tmp_path, capsys, many_images):
    folder, common = run
    image = next((many_images / "a").iterdir())
    assert main(["sample", *common, "count=2", f"out={tmp_path}/samples"]) == 0
    assert main(["edit", *common, f"input={image}", "frozen=1", f"out={tmp_path}/edited"]) == 0
    assert main(["orders", *common, f"runs={folder}/run/eval/default", f"out={tmp_path}/orders"]) == 0
    row = json.loads((tmp_path / "orders/orders.json").read_text())["orders"][0]
    assert row["code_width"] == 18 and len(row["r2"]) == 11
    assert main(["export", *common, f"out={tmp_path}/export", "programs=true"]) == 0
    assert list((tmp_path / "export").rglob("*.pt2"))
    assert not capsys.readouterr().err.count("Traceback")
