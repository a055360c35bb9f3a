"""Muon: its update, the parameters left to AdamW, and proportional learning rates."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from stages.layers import FusedLinear, HiddenLayers
from stages.optimizers import build_adamw, build_optimizer, learning_rates, orthogonalised
from stages.prior.config import PriorTrainingConfig
from stages.tokenizer.transformer import Block, TransformerConfig
from stages.training import build_schedule

MUON = PriorTrainingConfig(optimizer="muon", learning_rate=1e-2, matrix_learning_rate=1e-2, weight_decay=0.1)


class Hidden(HiddenLayers):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


def updated(network, optimizer, steps=3):
    """The network's weights after some updates with random gradients, equal for every optimizer."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach().clone() for parameter in network.parameters()]


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonalised(matrices, torch.float32) @ right.mT
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(found, torch.diag_embed(values), atol=1e-3, rtol=0)
    assert values.mean() == pytest.approx(0.9, abs=0.1) and values.max() < 1.3
    assert not orthogonalised(torch.zeros(1, *shape), torch.float32).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1e-6), ("32", 1e-3)])
def test_matrices_move_as_pytorch_has_it(precision, tolerance):
    """PyTorch's Muon computes in bfloat16; weights move by about 6e-3 here."""
    torch.manual_seed(0)
    network = Hidden(*(nn.Linear(*sides, bias=False) for sides in ((24, 24), (16, 48), (48, 16), (24, 24))))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    found = updated(network, build_optimizer(network, replace(MUON, precision=precision)))
    network.load_state_dict(dict(zip(network.state_dict(), before, strict=True)))
    reference = torch.optim.Muon(
        network.parameters(), 1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for one, other, start in zip(found, updated(network, reference), before, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)
        assert 2e-3 < (one - start).square().mean().sqrt() < 2e-2


def test_all_else_moves_as_under_adamw():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), Hidden(nn.Linear(8, 8)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = updated(network, build_optimizer(network, MUON))
    network.load_state_dict(before)
    reference = updated(network, build_adamw(network, 1e-2, (0.9, 0.95), 0.1))
    equal = {name for name, one, other in zip(before, found, reference, strict=True) if torch.equal(one, other)}
    assert before.keys() - equal == {"3.layers.0.weight"}


def test_matrices_that_stand_in_one_weight_move_like_matrices_apart():
    torch.manual_seed(0)
    fused = FusedLinear(16, 16, 3, bias=False)
    apart = Hidden(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    for layer, weight in zip(apart.layers, fused.weight.detach().chunk(3), strict=True):
        layer.weight.data.copy_(weight)
    (found,) = updated(Hidden(fused), build_optimizer(Hidden(fused), MUON))
    torch.testing.assert_close(found, torch.cat(updated(apart, build_optimizer(apart, MUON))))


def test_rates_keep_their_proportion_from_the_first_step_to_the_last():
    training = PriorTrainingConfig(
        optimizer="muon", learning_rate=1e-3, matrix_learning_rate=2e-2, max_steps=20, warmup_steps=5
    )
    network = Block(TransformerConfig(1, 16, 2), 1)
    optimizer = build_optimizer(network, training)
    schedule = build_schedule(optimizer, training)
    plain = build_adamw(network, 1e-3, (0.9, 0.95), 0.05)
    expected = build_schedule(plain, training)
    for step in range(20):
        schedule.step_update(step)
        expected.step_update(step)
        rates = learning_rates(optimizer, "rate")
        assert rates["rate"] == learning_rates(plain, "rate")["rate"]
        assert rates["matrix_rate"].item() == pytest.approx(20 * rates["rate"].item())
    assert learning_rates(plain, "rate").keys() == {"rate"}


def test_a_network_whose_layers_are_frozen_has_no_matrices_left():
    network = nn.ModuleList([Block(TransformerConfig(1, 16, 2), 1), nn.Linear(16, 16)])
    network[0].requires_grad_(False)
    groups = build_optimizer(network, MUON).param_groups
    assert {id(each) for group in groups for each in group["params"]} == {id(each) for each in network[1].parameters()}
    assert not any(group["matrices"] for group in groups)
