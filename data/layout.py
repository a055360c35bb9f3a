"""Token layout: everything that a prior knows about the tokens it models.

A tokenizer defines its layout, the manifest of a token cache stores it, and the prior is built from it.

- One sample is a sequence of *elements* in decoding order. An element has one or more *fields* (one softmax each).
- Elements are grouped into *scales*, coarse to fine. A scale may have a grid.
- Layouts are frozen and survive a round trip through JSON, so they can be compared with ``==``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Ends = Literal["fixed", "grammar"]


@dataclass(frozen=True)
class Field:
    """One softmax of an element: ids lie in ``[0, vocabulary_size)``. Signed values are stored with an offset."""

    name: str
    vocabulary_size: int


@dataclass(frozen=True)
class Scale:
    """A group of elements that are decoded together. Scales may share a codebook."""

    name: str
    length: int
    """Number of elements."""
    grid: tuple[int, int] | None
    """(rows, columns) for elements in raster order; None for elements without a position."""
    codebook: int
    """Index of the codebook of the ids."""
    fields: tuple[Field, ...]
    image_size: tuple[int, int]
    """(height, width) in pixels of the image decoded from all scales up to this one."""
    planes: str = "all"
    """Color planes of the scale: all, luma or chroma."""
    rung: tuple[int, int] | None = None
    """(height, width) of a smaller image that ``encode`` turns into approximately the scales up to this one. Only set
    where ``encodes_prefixes`` is False; None for none."""

    def __post_init__(self) -> None:
        if self.grid is not None and self.grid[0] * self.grid[1] != self.length:
            raise ValueError(f"scale {self.name}: grid {self.grid} does not hold {self.length} elements")


@dataclass(frozen=True)
class TokenLayout:
    """Arrangement of the tokens of one sample. Raises ValueError for inconsistent scales."""

    scales: tuple[Scale, ...]
    header: tuple[Field, ...] = ()
    """Side information before the elements, e.g. a start threshold."""
    max_length: int | None = None
    """Maximum number of elements for layouts of variable length; None for a fixed length."""
    ends: Ends = "fixed"
    grammar: dict[str, Any] | None = None
    """Kind and arguments of the grammar, as plain data, where ``ends`` is grammar; otherwise None."""
    encodes_prefixes: bool = False
    """True if a smaller image encodes to exactly the first scales of the larger one."""
    decodes_prefixes: bool = False
    """True if the first k scales decode to an image of their own size."""
    report_prefixes: tuple[int, ...] = ()
    """Numbers of scales to show in a report; empty means all."""

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("a layout needs at least one scale")
        if len({len(scale.fields) for scale in self.scales}) != 1:
            raise ValueError("all scales of a layout need the same number of fields")
        if (self.ends == "grammar") != (self.grammar is not None):
            raise ValueError(
                f"a layout with ends={self.ends!r} and grammar={self.grammar}; set a grammar only for ends='grammar'"
            )
        if self.ends != "fixed" and self.max_length is None:
            raise ValueError("a layout of variable length needs max_length")
        vocabularies: dict[int, tuple[Field, ...]] = {}
        for scale in self.scales:
            if vocabularies.setdefault(scale.codebook, scale.fields) != scale.fields:
                raise ValueError(f"scale {scale.name}: codebook {scale.codebook} has other fields in another scale")

    @property
    def keeps_prefixes(self) -> bool:
        """True if the first scales of an image do not depend on the others, so these can change alone."""
        return self.encodes_prefixes or self.ends == "grammar"

    @property
    def rungs(self) -> dict[tuple[int, int], int]:
        """Image sizes (height, width) that can be encoded, each with its number of scales."""
        if self.encodes_prefixes:
            return {scale.image_size: number for number, scale in enumerate(self.scales, 1)}
        small = {scale.rung: number for number, scale in enumerate(self.scales, 1) if scale.rung is not None}
        return {**small, self.image_size: len(self.scales)}

    @property
    def length(self) -> int:
        """Number of elements of a full sample (the maximum for variable lengths)."""
        return self.max_length if self.max_length is not None else sum(scale.length for scale in self.scales)

    @property
    def num_fields(self) -> int:
        """Number of fields of every element."""
        return len(self.scales[0].fields)

    @property
    def codebooks(self) -> tuple[int, ...]:
        """Codebook indices in order of first use."""
        return tuple(dict.fromkeys(scale.codebook for scale in self.scales))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image decoded from all scales."""
        return self.scales[-1].image_size

    @property
    def max_vocabulary_size(self) -> int:
        """The largest vocabulary of any field. It determines the integer type on disk."""
        return max(field.vocabulary_size for scale in self.scales for field in scale.fields)

    def fields_of(self, codebook: int) -> tuple[Field, ...]:
        """The fields of a codebook. Raises KeyError if no scale uses it."""
        for scale in self.scales:
            if scale.codebook == codebook:
                return scale.fields
        raise KeyError(codebook)

    def prefix_length(self, num_scales: int) -> int:
        """Number of elements in the first ``num_scales`` scales; the maximum for variable lengths.

        Raises ValueError outside 0 … S, the number of scales.
        """
        if not 0 <= num_scales <= len(self.scales):
            raise ValueError(f"num_scales={num_scales}; the layout has {len(self.scales)} scales")
        return sum(scale.length for scale in self.scales[:num_scales])

    def num_scales_in(self, length: int) -> int:
        """Number of complete scales in the first ``length`` elements. Raises ValueError if they end inside a scale."""
        ends = (0, *self.ends_of_scales)
        if length not in ends:
            raise ValueError(f"{length} elements end inside a scale; allowed: 0 or one of {self.ends_of_scales}")
        return ends.index(length)

    def scale_at(self, position: int) -> int:
        """Index of the scale of the element at ``position``, in a layout of fixed length."""
        return next(number for number, end in enumerate(self.ends_of_scales) if position < end)

    @property
    def ends_of_scales(self) -> tuple[int, ...]:
        """Number of elements up to and including each scale."""
        return tuple(accumulate(scale.length for scale in self.scales))

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of scales to report: ``report_prefixes``, or all."""
        return self.report_prefixes or tuple(range(1, len(self.scales) + 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TokenLayout:
        """The inverse of ``to_dict``, also after JSON. Raises TypeError or ValueError for invalid data."""

        def fields(items: list[dict[str, Any]]) -> tuple[Field, ...]:
            return tuple(Field(**item) for item in items)

        scales = tuple(
            Scale(
                **{
                    **item,
                    "grid": None if item["grid"] is None else tuple(item["grid"]),
                    "fields": fields(item["fields"]),
                    "image_size": tuple(item["image_size"]),
                    "rung": tuple(item["rung"]) if item.get("rung") else None,
                }
            )
            for item in data["scales"]
        )
        return cls(
            **{
                **data,
                "scales": scales,
                "header": fields(data["header"]),
                "report_prefixes": tuple(data["report_prefixes"]),
            }
        )


@dataclass
class Tokens:
    """A batch of token sequences."""

    ids: Tensor
    """int64 [B, L, F]"""
    lengths: Tensor
    """int64 [B]: number of valid elements of each sample; the rest is padding."""
    header: Tensor
    """int64 [B, S] side information; S may be 0."""
    notes: Tensor | None = None
    """int32 [B, L, P]: grammar state before each element (``Grammar.annotate``); None if not computed."""
    remarks: dict[str, Tensor] | None = None
    """Statistics of the encoder per sample: counts int64 [B] by name, on the CPU. The manifest of a cache stores their
    sums."""

    @classmethod
    def fixed(cls, ids: Tensor) -> Tokens:
        """Tokens of a layout of fixed length without header, from ids [B, L, F]."""
        batch, length = ids.shape[:2]
        lengths = torch.full((batch,), length, dtype=torch.int64, device=ids.device)
        return cls(ids, lengths, ids.new_zeros(batch, 0))

    @classmethod
    def from_batch(cls, batch: dict[str, Tensor]) -> Tokens:
        """Tokens from a batch of a token cache: ids, plus length, header and notes if present."""
        tokens = cls.fixed(batch["ids"])
        return cls(
            tokens.ids, batch.get("length", tokens.lengths), batch.get("header", tokens.header), batch.get("notes")
        )

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """Concatenate batches, padded with 0 to the longest. Drops notes and remarks."""
        longest = max(part.ids.shape[1] for part in parts)
        ids = [functional.pad(part.ids, (0, 0, 0, longest - part.ids.shape[1])) for part in parts]
        lengths, header = ([getattr(part, name) for part in parts] for name in ("lengths", "header"))
        return cls(torch.cat(ids), torch.cat(lengths), torch.cat(header))

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tokens:
        """The samples ``rows``, in that order."""
        notes = None if self.notes is None else self.notes[rows]
        remarks = None if self.remarks is None else {name: counts[rows] for name, counts in self.remarks.items()}
        return Tokens(self.ids[rows], self.lengths[rows], self.header[rows], notes, remarks)

    @property
    def counted(self) -> Tensor:
        """bool [B, L]: False for padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    def split(self, size: int) -> Iterator[Tokens]:
        """Batches of ``size`` samples; the last one may be smaller."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on another device."""
        notes = None if self.notes is None else self.notes.to(device)
        return Tokens(self.ids.to(device), self.lengths.to(device), self.header.to(device), notes, self.remarks)

    def prefix(self, length: int) -> Tokens:
        """The first ``length`` elements of every sample."""
        notes = None if self.notes is None else self.notes[:, :length]
        return Tokens(self.ids[:, :length], self.lengths.clamp(max=length), self.header, notes, self.remarks)
