"""Quantisers: ids and features agree, gradients pass, codes live."""

import pytest
import torch

from stages.factory import build_quantizer
from stages.tokenizer.quantizers import CosineVQConfig, FSQConfig

CONFIGS = [FSQConfig(levels=[8, 5, 5, 5]), FSQConfig(levels=[2, 3]), CosineVQConfig(codes=50, code_dim=8)]


def make(config):
    torch.manual_seed(0)
    return build_quantizer(config, 16, 24)


@pytest.mark.parametrize("config", CONFIGS)
def test_lookup_of_ids_is_what_was_quantised(config):
    quantizer = make(config).eval()
    result = quantizer(torch.randn(3, 40, 16) * 3)
    assert result.features.shape == (3, 40, 24) and result.ids.shape == (3, 40, 1)
    torch.testing.assert_close(quantizer.lookup(result.ids), result.features, atol=1e-5, rtol=1e-5)
    assert result.ids.min() >= 0 and result.ids.max() < quantizer.fields[0].vocabulary_size


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_reach_the_encoder_and_every_parameter(config):
    quantizer = make(config).train()
    x = torch.randn(4, 64, 16, requires_grad=True)
    result = quantizer(x)
    (result.features.square().mean() + sum(result.losses.values(), torch.zeros(()))).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


def test_fsq_reaches_every_code_and_each_id_is_another_vector():
    quantizer = make(FSQConfig(levels=[4, 3])).eval()
    quantizer.project_in = torch.nn.Identity()
    ids = quantizer(torch.randn(1, 4000, 2) * 2).ids
    assert ids.unique().numel() == 12
    vectors = quantizer.lookup(torch.arange(12).view(1, 12, 1))[0]
    assert len(torch.unique(vectors, dim=0)) == 12


@pytest.mark.parametrize("config", CONFIGS)
def test_autocast_does_not_change_ids(config):
    quantizer = make(config).eval()
    x = torch.randn(2, 100, 16)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = quantizer(x).ids
    assert torch.equal(lowered, quantizer(x).ids)


def test_cosine_starts_from_data_and_revives_dead_codes():
    quantizer = make(CosineVQConfig(codes=64, code_dim=8, revive_every=5, revive_below=0.1)).train()
    used = set()
    for step in range(600):
        x = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(step))
        if step == 0:  # half of the codebook starts where no data will ever be
            quantizer(x)
            with torch.no_grad():
                quantizer.codebook.weight[:60] = quantizer.codebook.weight[60]
        ids = quantizer(x).ids
        if step >= 590:
            used |= set(ids.flatten().tolist())
    assert len(used) >= 50


def test_revived_rows_reach_the_average_once():
    quantizer, average = make(CosineVQConfig(codes=8, code_dim=4)).train(), make(CosineVQConfig(codes=8, code_dim=4))
    quantizer(torch.randn(2, 16, 16))
    assert not torch.equal(quantizer.codebook.weight, average.codebook.weight)
    quantizer.copy_revived(average)
    assert torch.equal(quantizer.codebook.weight, average.codebook.weight) and not quantizer.codebook.revived.any()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("wrong", [-1, 5000])
def test_ids_out_of_range_are_refused(config, wrong):
    with pytest.raises(ValueError, match=f"id {wrong}"):
        make(config).lookup(torch.tensor([[[wrong]]]))


def test_configs_without_codes_are_refused():
    with pytest.raises(ValueError, match="levels"):
        make(FSQConfig(levels=[8, 1]))
    with pytest.raises(ValueError, match="codes"):
        make(CosineVQConfig(codes=1))
