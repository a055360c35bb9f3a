"""Registries of parts and functions that build them. A new part adds one line: kind: (config dataclass, class)."""

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

Registry = dict[str, tuple[str, str]]
"""kind: (config dataclass, class), each as module:name. Modules of config dataclasses do not import torch, so configs
are checked before torch is loaded."""

TOKENIZERS: Registry = {
    "sit": ("stages.tokenizer.config:SITConfig", "stages.tokenizer.sit:SIT"),
    "vit-vqgan": ("stages.tokenizer.config:ViTVQGANConfig", "stages.tokenizer.sit:SIT"),
    "nested": ("stages.tokenizer.config:NestedConfig", "stages.tokenizer.nested:NestedTokenizer"),
    "bitplane": ("stages.codecs.config:BitplaneConfig", "stages.codecs.bitplane:BitplaneCodec"),
    "sparse-dct": ("stages.codecs.config:SparseDCTConfig", "stages.codecs.sparse_dct:SparseDCTCodec"),
}
GRAMMARS: dict[str, str] = {
    "bitplane": "stages.codecs.grammar:BitplaneGrammar",
    "list": "stages.lists:ListGrammar",
}
QUANTIZERS: Registry = {
    "fsq": ("stages.tokenizer.parts:FSQConfig", "stages.tokenizer.quantizers:FSQ"),
    "lfq": ("stages.tokenizer.parts:LFQConfig", "stages.tokenizer.quantizers:LFQ"),
    "bsq": ("stages.tokenizer.parts:BSQConfig", "stages.tokenizer.quantizers:BSQ"),
    "cosine": ("stages.tokenizer.parts:CosineVQConfig", "stages.tokenizer.quantizers:CosineVQ"),
    "simvq": ("stages.tokenizer.parts:SimVQConfig", "stages.tokenizer.quantizers:SimVQ"),
    "residual": ("stages.tokenizer.parts:ResidualVQConfig", "stages.tokenizer.quantizers:ResidualVQ"),
}
HEADS: Registry = {
    "none": ("stages.tokenizer.parts:HeadConfig", "stages.tokenizer.heads:NoHead"),
    "wavelet": ("stages.tokenizer.parts:WaveletHeadConfig", "stages.tokenizer.heads:WaveletHead"),
}
CONDITIONS: Registry = {
    "none": ("stages.conditions.config:NoConditionConfig", "stages.conditions.labels:NoCondition"),
    "class": ("stages.conditions.config:ClassConditionConfig", "stages.conditions.labels:ClassCondition"),
    "text": ("stages.conditions.config:TextConditionConfig", "stages.conditions.text:TextCondition"),
    "class-text": ("stages.conditions.config:ClassTextConditionConfig", "stages.conditions.text:ClassTextCondition"),
}
PRIORS: Registry = {
    "transformer": ("stages.prior.config:TransformerPriorConfig", "stages.prior.transformer:TransformerPrior"),
    "chunked": ("stages.prior.config:ChunkedPriorConfig", "stages.prior.chunked:ChunkedPrior"),
}


def _load(place: str) -> Any:
    """Import ``module:name``."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


def _look_up(registry: Registry, section: str, kind: str) -> tuple[str, str]:
    if not isinstance(kind, str) or kind not in registry:  # a YAML can hold anything
        raise InputError(f"{section}.kind={kind!r}; allowed: {', '.join(sorted(registry))}")
    return registry[kind]


def _config_of(registry: Registry, section: str, kind: str) -> type[Any]:
    return _load(_look_up(registry, section, kind)[0])


def _class_of(registry: Registry, section: str, kind: str) -> type[Any]:
    return _load(_look_up(registry, section, kind)[1])


def tokenizer_config(kind: str) -> type[Any]:
    """The config dataclass of a tokenizer kind. Like all lookups here, raises ValueError, which lists valid kinds."""
    return _config_of(TOKENIZERS, "tokenizer", kind)


def quantizer_config(kind: str) -> type[Any]:
    """The config dataclass of a quantizer kind."""
    return _config_of(QUANTIZERS, "tokenizer.quantizer", kind)


def head_config(kind: str) -> type[Any]:
    """The config dataclass of a kind of head, a decoder for any resolution."""
    return _config_of(HEADS, "tokenizer.head", kind)


def condition_config(kind: str) -> type[Any]:
    """The config dataclass of a condition kind."""
    return _config_of(CONDITIONS, "condition", kind)


def prior_config(kind: str) -> type[Any]:
    """The config dataclass of a prior kind."""
    return _config_of(PRIORS, "prior", kind)


def condition_class(kind: str) -> type[Condition]:
    """The class of a condition kind."""
    return _class_of(CONDITIONS, "condition", kind)


def build_tokenizer(config: Any, image_size: tuple[int, int], channels: int) -> Tokenizer:
    """Build a tokenizer of ``config.kind`` with new weights, for pixels [B, channels, *image_size]."""
    return _class_of(TOKENIZERS, "tokenizer", config.kind)(config, image_size=image_size, channels=channels)


def build_grammar(layout: TokenLayout, **more: Any) -> Grammar | None:
    """Build the grammar of a layout; None if it has none. ``more`` are additional arguments from a prior.

    Raises ValueError, which lists valid kinds, for an unknown kind.
    """
    if layout.grammar is None:
        return None
    kind = layout.grammar["kind"]
    if kind not in GRAMMARS:
        raise InputError(f"a grammar of kind {kind!r}; this version knows {', '.join(sorted(GRAMMARS))}")
    grammar: Grammar = _load(GRAMMARS[kind])(
        **{key: value for key, value in layout.grammar.items() if key != "kind"}, **more
    )
    return grammar


def build_quantizer(config: Any, width_in: int, width_out: int) -> Quantizer:
    """Build a quantizer of ``config.kind`` for features [B, N, width_in] → [B, N, width_out]."""
    return _class_of(QUANTIZERS, "tokenizer.quantizer", config.kind)(config, width_in, width_out)


def build_head(config: Any, width_in: int, patch: int, grid: tuple[int, int], channels: int) -> Head:
    """Build a head of ``config.kind`` for a ``grid`` of features, one per ``patch`` x ``patch`` pixels."""
    return _class_of(HEADS, "tokenizer.head", config.kind)(config, width_in, patch, grid, channels)


def build_condition(config: Any, class_names: list[str], width: int, text: dict[str, Any] | None = None) -> Condition:
    """Build a condition of ``config.kind`` for a prior of that width. ``text`` is the spec of the text encoder."""
    return condition_class(config.kind)(config, class_names, width, text)


def build_prior(
    config: Any, condition: Any, layout: TokenLayout, class_names: list[str], text: dict[str, Any] | None = None
) -> Prior:
    """Build a prior of ``config.kind`` with new weights for ``layout``, with the condition config ``condition``."""
    cls = _class_of(PRIORS, "prior", config.kind)
    if (config.kind, config.order) == ("transformer", "scale"):  # same config keys, other training and sampling
        cls = _load("stages.prior.scalewise:ScalewisePrior")
    return cls(config, condition, layout, class_names, text)
