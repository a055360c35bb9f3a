"""One factory a concern: the line that a new part adds stands here, as kind: (module, config dataclass, class)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from data.errors import InputError

if TYPE_CHECKING:
    from data.layout import TokenLayout
    from stages.contract import Condition, Prior, Tokenizer
    from stages.grammar import Grammar
    from stages.tokenizer.heads import Head
    from stages.tokenizer.quantizers import Quantizer

Registry = dict[str, tuple[str, str, str]]

TOKENIZERS: Registry = {
    "sit": ("stages.tokenizer.sit", "SITConfig", "SIT"),
    "vit-vqgan": ("stages.tokenizer.sit", "ViTVQGANConfig", "SIT"),
    "nested": ("stages.tokenizer.nested", "NestedConfig", "NestedTokenizer"),
    "bitplane": ("stages.codecs.bitplane", "BitplaneConfig", "BitplaneCodec"),
    "sparse-dct": ("stages.codecs.sparse_dct", "SparseDCTConfig", "SparseDCTCodec"),
}
GRAMMARS: dict[str, tuple[str, str]] = {
    "bitplane": ("stages.codecs.grammar", "BitplaneGrammar"),
    "list": ("stages.lists", "ListGrammar"),
}
QUANTIZERS: Registry = {
    "fsq": ("stages.tokenizer.quantizers", "FSQConfig", "FSQ"),
    "lfq": ("stages.tokenizer.quantizers", "LFQConfig", "LFQ"),
    "bsq": ("stages.tokenizer.quantizers", "BSQConfig", "BSQ"),
    "cosine": ("stages.tokenizer.quantizers", "CosineVQConfig", "CosineVQ"),
    "simvq": ("stages.tokenizer.quantizers", "SimVQConfig", "SimVQ"),
    "residual": ("stages.tokenizer.quantizers", "ResidualVQConfig", "ResidualVQ"),
}
HEADS: Registry = {
    "none": ("stages.tokenizer.heads", "HeadConfig", "NoHead"),
    "wavelet": ("stages.tokenizer.heads", "WaveletHeadConfig", "WaveletHead"),
}
CONDITIONS: Registry = {
    "none": ("stages.conditions.labels", "NoConditionConfig", "NoCondition"),
    "class": ("stages.conditions.labels", "ClassConditionConfig", "ClassCondition"),
    "text": ("stages.conditions.text", "TextConditionConfig", "TextCondition"),
    "class-text": ("stages.conditions.text", "ClassTextConditionConfig", "ClassTextCondition"),
}
PRIORS: Registry = {
    "transformer": ("stages.prior.transformer", "TransformerPriorConfig", "TransformerPrior"),
    "chunked": ("stages.prior.chunked", "ChunkedPriorConfig", "ChunkedPrior"),
}


def _look_up(registry: Registry, section: str, kind: str) -> tuple[Any, Any]:
    if not isinstance(kind, str) or kind not in registry:  # a YAML can hold anything
        raise InputError(f"{section}.kind={kind!r}; allowed: {', '.join(sorted(registry))}")
    module, config, cls = registry[kind]
    loaded = import_module(module)
    return getattr(loaded, config), getattr(loaded, cls)


def tokenizer_kind(kind: str) -> tuple[type[Any], type[Tokenizer]]:
    """(config dataclass, class) of a tokenizer kind. Raises ValueError that lists the kinds; so do the others."""
    return _look_up(TOKENIZERS, "tokenizer", kind)


def quantizer_kind(kind: str) -> tuple[type[Any], type[Quantizer]]:
    """(config dataclass, class) of a quantiser kind."""
    return _look_up(QUANTIZERS, "tokenizer.quantizer", kind)


def head_kind(kind: str) -> tuple[type[Any], type[Head]]:
    """(config dataclass, class) of the kind of a decoder for any resolution."""
    return _look_up(HEADS, "tokenizer.head", kind)


def condition_kind(kind: str) -> tuple[type[Any], type[Condition]]:
    """(config dataclass, class) of a condition kind."""
    return _look_up(CONDITIONS, "condition", kind)


def prior_kind(kind: str) -> tuple[type[Any], type[Prior]]:
    """(config dataclass, class) of a prior kind."""
    return _look_up(PRIORS, "prior", kind)


def build_tokenizer(config: Any, image_size: tuple[int, int], channels: int) -> Tokenizer:
    """A tokenizer of ``config.kind`` with fresh weights, for pixels [B, channels, *image_size]."""
    return tokenizer_kind(config.kind)[1](config, image_size=image_size, channels=channels)


def build_grammar(layout: TokenLayout, **more: Any) -> Grammar | None:
    """The grammar of a layout, None where it has none; ``more`` is what a prior adds to it.

    Raises ValueError that lists the kinds.
    """
    if layout.grammar is None:
        return None
    kind = layout.grammar["kind"]
    if kind not in GRAMMARS:
        raise InputError(f"a grammar of kind {kind!r}; this version knows {', '.join(sorted(GRAMMARS))}")
    module, cls = GRAMMARS[kind]
    grammar: Grammar = getattr(import_module(module), cls)(
        **{key: value for key, value in layout.grammar.items() if key != "kind"}, **more
    )
    return grammar


def build_quantizer(config: Any, width_in: int, width_out: int) -> Quantizer:
    """A quantiser of ``config.kind`` for features [B, N, width_in] → [B, N, width_out]."""
    return quantizer_kind(config.kind)[1](config, width_in, width_out)


def build_head(config: Any, width_in: int, patch: int, grid: tuple[int, int], channels: int) -> Head:
    """A decoder of ``config.kind`` for any resolution, from features of a ``grid`` of places of ``patch`` pixels."""
    return head_kind(config.kind)[1](config, width_in, patch, grid, channels)


def build_condition(config: Any, class_names: list[str], width: int, text: dict[str, Any] | None = None) -> Condition:
    """A condition of ``config.kind`` that speaks to a prior of that width; ``text`` is the text encoder's spec."""
    return condition_kind(config.kind)[1](config, class_names, width, text)


def build_prior(
    config: Any, condition: Any, layout: TokenLayout, class_names: list[str], text: dict[str, Any] | None = None
) -> Prior:
    """A prior of ``config.kind`` with fresh weights over ``layout``, conditioned as ``condition`` says."""
    cls = prior_kind(config.kind)[1]
    if (config.kind, config.order) == ("transformer", "scale"):  # the same keys, trained and sampled in another way
        cls = import_module("stages.prior.scalewise").ScalewisePrior
    return cls(config, condition, layout, class_names, text)
