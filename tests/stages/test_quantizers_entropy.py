"""The entropy term of sign quantizers, checked against sums over all codes."""

import itertools
import math

import pytest
import torch

from stages.factory import build_quantizer
from stages.tokenizer.quantizers import BSQConfig, LFQConfig
from stages.tokenizer.quantizers.binary import entropy_loss, mean_use


def every_code(bits):
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)), dtype=torch.float64)


def soft(numbers, temperature):
    """Probabilities [M, 2^bits] of all codes from their squared distances."""
    codes = every_code(numbers.shape[1])
    distances = (numbers[:, None] - codes).square().sum(-1)
    return (-distances / temperature).softmax(-1)


def entropy(shares):
    return -(shares * shares.clamp_min(1e-300).log()).sum(-1)


def numbers(count=40, bits=5):
    return torch.randn(count, bits, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_the_joint_entropy_is_that_of_all_codes(bits, temperature):
    x = numbers(bits=bits)
    probabilities = soft(x, temperature)
    wanted = entropy(probabilities).mean() - entropy(probabilities.mean(0))
    torch.testing.assert_close(entropy_loss(x, [bits], temperature, agree=False), wanted)


@pytest.mark.parametrize("groups", [[1] * 5, [3, 2], [5]])
def test_groups_are_the_codes_of_their_own_bits(groups):
    x = numbers()
    own = entropy(soft(x, 1.0)).mean()
    used = sum(entropy(soft(part, 1.0).mean(0)) for part in x.split(groups, 1))
    found = entropy_loss(x, groups, 1.0, agree=False)
    torch.testing.assert_close(found, own - used)
    # with several groups the entropy is never underestimated
    assert found <= entropy_loss(x, [5], 1.0, agree=False) + 1e-9


def test_the_gradient_is_that_of_the_sum_over_all_codes():
    x, y = numbers().requires_grad_(), numbers().requires_grad_()
    probabilities = soft(y, 0.7)
    (entropy(probabilities).mean() - entropy(probabilities.mean(0))).backward()
    entropy_loss(x, [5], 0.7, agree=False).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_mean_use_is_a_distribution_over_codes():
    found = mean_use(torch.rand(30, 5))
    assert found.shape == (32,)
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))


def test_bounds_are_bits():
    """Confident, uniformly used codes: minus all bits. Undecided codes, or always the same code: 0."""
    codes = every_code(4)
    for groups in ([4], [1] * 4):
        for x, wanted in ((100 * codes, -4 * math.log(2)), (0 * codes, 0.0), (100 * codes[:1].expand(9, -1), 0.0)):
            torch.testing.assert_close(
                entropy_loss(x, groups, 1.0, agree=False), torch.tensor(wanted, dtype=x.dtype), atol=1e-9, rtol=0
            )


def test_18_bits_need_no_table_of_2_to_the_18():
    torch.manual_seed(0)
    quantizer = build_quantizer(LFQConfig(bits=18), 8, 8)
    assert quantizer.groups == [9, 9]
    with torch.profiler.profile(profile_memory=True) as profile:
        quantizer(torch.randn(2, 4, 8)).losses["entropy"].backward()
    largest = max(abs(event.cpu_memory_usage) for event in profile.events())
    assert 0 < largest < 2**18


def test_bsq_is_the_papers_closed_form():
    """arXiv 2406.07548: sigmoid of 2 τ u c with c = 1/√d, entropies summed over bits; τ = 2 d / temperature."""
    torch.manual_seed(0)
    temperature, bits = 0.8, 6
    quantizer = build_quantizer(BSQConfig(bits=bits, entropy_group_bits=1, temperature=temperature), 5, 5).double()
    features = torch.randn(2, 30, 5, dtype=torch.float64)
    u = torch.nn.functional.normalize(quantizer.project_in(features).flatten(0, 1), dim=-1)
    positive = (2 * (2 * bits / temperature) * u / math.sqrt(bits)).sigmoid()
    both = torch.stack([positive, 1 - positive], dim=-1)
    wanted = entropy(both).sum(-1).mean() - entropy(both.mean(0)).sum()
    found = entropy_loss(quantizer.encodings(features), quantizer.groups, temperature, agree=False)
    torch.testing.assert_close(found, wanted)
