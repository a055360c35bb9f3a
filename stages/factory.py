"""One factory a concern: the line that a new part adds stands here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from stages.contract import Tokenizer

TOKENIZERS: dict[str, tuple[str, str, str]] = {
    # kind: (module, config dataclass, Tokenizer subclass); called as Class(config, image_size=(h, w), channels=c)
    "sit": ("stages.tokenizer.sit", "SITConfig", "SIT"),
}


def tokenizer_kind(kind: str) -> tuple[type[Any], type[Tokenizer]]:
    """(config dataclass, class) of a tokenizer kind. Raises ValueError that lists the kinds."""
    if kind not in TOKENIZERS:
        raise ValueError(f"tokenizer.kind={kind!r}; allowed: {', '.join(sorted(TOKENIZERS))}")
    module, config, cls = TOKENIZERS[kind]
    loaded = import_module(module)
    return getattr(loaded, config), getattr(loaded, cls)


def build_tokenizer(config: Any, image_size: tuple[int, int], channels: int) -> Tokenizer:
    """A tokenizer of ``config.kind`` with fresh weights, for pixels [B, channels, *image_size]."""
    _, cls = tokenizer_kind(config.kind)
    return cls(config, image_size=image_size, channels=channels)
