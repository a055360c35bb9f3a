"""A GPU without float64 computes what the CPU does, played by the CPU: the same tokens, samples and images."""

from contextlib import nullcontext

import pytest
import torch

from pipeline.config import load_config
from pipeline.models import join
from stages.doubles import WITHOUT_FLOAT64, doubled, doubles_at
from stages.weights import load_prior, load_tokenizer
from tests.pipeline.apple import Apple, AppleMachine
from tests.pipeline.untrained import KINDS, write_run


@pytest.fixture
def apple(monkeypatch):
    """The device of a pretended Apple machine."""
    monkeypatch.setattr("stages.doubles.WITHOUT_FLOAT64", (*WITHOUT_FLOAT64, "meta"))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    made = torch.tensor

    def tensor(data, dtype=None, device="cpu"):
        # a device that a `with` names would be the real meta, which has no data
        return made(data, dtype=dtype, device="cpu").to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with AppleMachine():
        yield torch.device("meta")
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_float64_of_apple_gpus_is_the_cpus():
    assert doubles_at(torch.device("mps")) == torch.device("cpu")
    assert all(doubles_at(torch.device(kind)).type == kind for kind in ("cpu", "cuda"))


def test_the_pretended_machine_has_no_float64(apple):
    here = torch.rand(3, device=apple)
    for make in (here.double, lambda: torch.rand(3, dtype=torch.float64).to(apple), lambda: here + torch.rand(3)):
        with pytest.raises((TypeError, RuntimeError), match="float64|same device"):
            make()
    assert isinstance(here, Apple) and not isinstance(doubled(here), Apple) and doubled(here).dtype == torch.float64


@pytest.mark.parametrize("kind", ["sit-words", "nested", "sparse-dct", "in rounds"])
def test_tokens_samples_and_images_are_those_of_the_cpu(tmp_path, image_folder, kind, apple, monkeypatch):
    monkeypatch.setitem(KINDS, "in rounds", ("prior.order=scale",))
    name, *keys = write_run(tmp_path, image_folder, kind)
    config = load_config(name, [*keys, "sampling.scales=2"])
    tokenizers = [load_tokenizer(config.tokenizer.path)[0] for _ in range(2)]
    here, there = (
        join(tokenizer, load_prior(config.prior.path)[0], device, 8, "32")
        for tokenizer, device in zip(tokenizers, (torch.device("cpu"), apple), strict=True)
    )
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        tokens = there.tokenizer.encode(pixels.to(apple))
        assert isinstance(tokens.ids, Apple) and tokens.ids.cpu().equal(here.tokenizer.encode(pixels).ids)
        drawn, wanted = (
            models.draw(models.prompts([0, 1], ["", ""]), config.sampling, [3, 4]) for models in (there, here)
        )
        assert drawn.ids.equal(wanted.ids) and drawn.lengths.equal(wanted.lengths)
        made = there.tokenizer.decode(drawn.to(apple))
        assert isinstance(made, Apple)
        torch.testing.assert_close(made.cpu(), here.tokenizer.decode(wanted))  # attention is computed in other parts
