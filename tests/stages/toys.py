"""Small test helpers: layouts, priors and a prior without weights."""

import torch

from data.layout import Field, Scale, TokenLayout
from stages.conditions.labels import ClassConditionConfig
from stages.contract import Prior
from stages.factory import build_prior
from stages.prior.transformer import TransformerPriorConfig


def layout(vocabulary=11, num_fields=1, scales=3, decodes_prefixes=True):
    """Scales of 2x2 elements; the first has its own codebook."""
    coarse = tuple(Field(f"field{index}", vocabulary) for index in range(num_fields))
    fine = tuple(Field(f"field{index}", vocabulary + 2) for index in range(num_fields))
    return TokenLayout(
        tuple(Scale(f"scale{k}", 4, (2, 2), min(k, 1), fine if k else coarse, (4 << k, 4 << k)) for k in range(scales)),
        decodes_prefixes=decodes_prefixes,
    )


def prior(layout, seed=0, classes=("a", "b", "c"), **keys):
    """A small transformer with large weights, so that every token matters."""
    torch.manual_seed(seed)
    config = TransformerPriorConfig(**{"depth": 2, "width": 32, "heads": 4, "dropout": 0.0, **keys})
    built = build_prior(config, ClassConditionConfig(), layout, list(classes))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built.eval()


class FixedPrior(Prior):
    """A prior without weights: the same logits at every element, and other logits without a condition."""

    def __init__(self, layout, conditional, unconditional=None):
        super().__init__()
        self.layout = layout
        self.conditional = torch.tensor(conditional)
        self.unconditional = self.conditional if unconditional is None else torch.tensor(unconditional)
        self.seen = []

    def forward(self, tokens, prompts):
        raise AssertionError("sampling asks for logits only")

    def begin(self, prompts, prefix, length, whole=()):
        self.seen = []
        return prompts.labels

    def logits(self, state, partial):
        return torch.where((state < 0)[:, None], self.unconditional, self.conditional)

    def advance(self, state, element):
        self.seen.append(element)


def same_weights(one, other):
    """Whether two models have bitwise equal states. Their outputs may still differ in the last bits, which depend on
    the memory alignment of tensors."""
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(x.equal(states[1][name]) for name, x in states[0].items())
