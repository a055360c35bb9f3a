"""The layout: all that a prior knows of the tokens it models.

A tokenizer says once how its tokens are arranged, the manifest of a cache stores it, and the prior is built from it.
What is notable here:

- one sample is a sequence of *elements* in decoding order; an element has one or more *fields* (one softmax each);
- elements are grouped into *scales*, coarse to fine; a scale may have a grid, or none;
- everything is frozen and makes the round trip through JSON, so a layout can be compared with ``==``.
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
    """A group of elements that are decoded together, in decoding order. Scales may share a codebook."""

    name: str
    length: int
    """Number of elements."""
    grid: tuple[int, int] | None
    """(rows, columns) where the elements lie in raster order; None for elements without a place."""
    codebook: int
    """Index of the codebook that gives the ids their meaning."""
    fields: tuple[Field, ...]
    image_size: tuple[int, int]
    """(height, width) in pixels of the image that the scales up to this one decode to."""
    planes: str = "all"
    """Which colour planes the scale carries: all, luma or chroma."""
    rung: tuple[int, int] | None = None
    """(height, width) of the small image that ``encode`` turns into about the scales up to this one, where such images
    do not give exactly them (``encodes_prefixes``); None for none."""

    def __post_init__(self) -> None:
        if self.grid is not None and self.grid[0] * self.grid[1] != self.length:
            raise ValueError(f"scale {self.name}: grid {self.grid} does not hold {self.length} elements")


@dataclass(frozen=True)
class TokenLayout:
    """Arrangement of one sample's tokens. Raises ValueError when the scales contradict one another."""

    scales: tuple[Scale, ...]
    header: tuple[Field, ...] = ()
    """Side information that stands before the elements, e.g. a start threshold."""
    max_length: int | None = None
    """Cap for layouts of variable length; None where the length is fixed."""
    ends: Ends = "fixed"
    grammar: dict[str, Any] | None = None
    """What may follow what, where the layout ends by a grammar: its kind and what it is built from. Plain data."""
    encodes_prefixes: bool = False
    """A smaller image gives exactly the first scales of the large one."""
    decodes_prefixes: bool = False
    """The first k scales decode to an image of their own size."""
    report_prefixes: tuple[int, ...] = ()
    """Numbers of scales worth showing in a report; empty means every one."""

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("a layout needs at least one scale")
        if len({len(scale.fields) for scale in self.scales}) != 1:
            raise ValueError("all scales of a layout have the same number of fields")
        if (self.ends == "grammar") != (self.grammar is not None):
            raise ValueError(f"a layout that ends by {self.ends!r} with the grammar {self.grammar}")
        if self.ends != "fixed" and self.max_length is None:
            raise ValueError("a layout of variable length needs max_length")
        vocabularies: dict[int, tuple[Field, ...]] = {}
        for scale in self.scales:
            if vocabularies.setdefault(scale.codebook, scale.fields) != scale.fields:
                raise ValueError(f"scale {scale.name}: codebook {scale.codebook} has other fields in another scale")

    @property
    def keeps_prefixes(self) -> bool:
        """The first scales of an image can stay while the others change: they know nothing of them."""
        return self.encodes_prefixes or self.ends == "grammar"

    @property
    def rungs(self) -> dict[tuple[int, int], int]:
        """Sizes (height, width) of the images that can be encoded, and how many scales each gives."""
        if self.encodes_prefixes:
            return {scale.image_size: number for number, scale in enumerate(self.scales, 1)}
        small = {scale.rung: number for number, scale in enumerate(self.scales, 1) if scale.rung is not None}
        return {**small, self.image_size: len(self.scales)}

    @property
    def length(self) -> int:
        """Number of elements of a full sample (the cap for variable lengths)."""
        return self.max_length if self.max_length is not None else sum(scale.length for scale in self.scales)

    @property
    def num_fields(self) -> int:
        """Number of fields of every element."""
        return len(self.scales[0].fields)

    @property
    def codebooks(self) -> tuple[int, ...]:
        """Codebook indices in the order of their first use."""
        return tuple(dict.fromkeys(scale.codebook for scale in self.scales))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image that all scales decode to."""
        return self.scales[-1].image_size

    @property
    def max_vocabulary_size(self) -> int:
        """The largest vocabulary among the fields: it decides the integer type on disk."""
        return max(field.vocabulary_size for scale in self.scales for field in scale.fields)

    def fields_of(self, codebook: int) -> tuple[Field, ...]:
        """The fields of a codebook. Raises KeyError when no scale uses it."""
        for scale in self.scales:
            if scale.codebook == codebook:
                return scale.fields
        raise KeyError(codebook)

    def prefix_length(self, num_scales: int) -> int:
        """Number of elements in the first ``num_scales`` scales; of variable length, the most that they can have.

        Raises ValueError outside 0 … S.
        """
        if not 0 <= num_scales <= len(self.scales):
            raise ValueError(f"num_scales={num_scales}; the layout has {len(self.scales)} scales")
        return sum(scale.length for scale in self.scales[:num_scales])

    def num_scales_in(self, length: int) -> int:
        """Number of whole scales in the first ``length`` elements. Raises ValueError when a scale is cut."""
        ends = (0, *self.ends_of_scales)
        if length not in ends:
            raise ValueError(f"{length} elements end inside a scale; whole scales end at {self.ends_of_scales}")
        return ends.index(length)

    def scale_at(self, position: int) -> int:
        """The scale of an element in a layout of fixed length."""
        return next(number for number, end in enumerate(self.ends_of_scales) if position < end)

    @property
    def ends_of_scales(self) -> tuple[int, ...]:
        """Number of elements up to and with each scale."""
        return tuple(accumulate(scale.length for scale in self.scales))

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of scales to report: ``report_prefixes``, or every one."""
        return self.report_prefixes or tuple(range(1, len(self.scales) + 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TokenLayout:
        """The inverse of ``to_dict``, also after JSON. Raises TypeError or ValueError on foreign data."""

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
    """int64 [B]: how many of the L elements count."""
    header: Tensor
    """int64 [B, S] side information; S may be 0."""
    notes: Tensor | None = None
    """int32 [B, L, P]: what a grammar knows before each element (``Grammar.annotate``); None where nobody asked."""
    remarks: dict[str, Tensor] | None = None
    """What an encoder has to say of each sample, as counts int64 [B] by name, on the CPU; a cache's manifest has their
    sums."""

    @classmethod
    def fixed(cls, ids: Tensor) -> Tokens:
        """Tokens of a fixed layout without header, from ids [B, L, F]."""
        batch, length = ids.shape[:2]
        lengths = torch.full((batch,), length, dtype=torch.int64, device=ids.device)
        return cls(ids, lengths, ids.new_zeros(batch, 0))

    @classmethod
    def from_batch(cls, batch: dict[str, Tensor]) -> Tokens:
        """The tokens of a batch of cached ones: ids, and length, header and notes where the layout has them."""
        tokens = cls.fixed(batch["ids"])
        return cls(
            tokens.ids, batch.get("length", tokens.lengths), batch.get("header", tokens.header), batch.get("notes")
        )

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """Batches one after the other, padded with 0 to the longest; without notes and remarks."""
        longest = max(part.ids.shape[1] for part in parts)
        ids = [functional.pad(part.ids, (0, 0, 0, longest - part.ids.shape[1])) for part in parts]
        lengths, header = ([getattr(part, name) for part in parts] for name in ("lengths", "header"))
        return cls(torch.cat(ids), torch.cat(lengths), torch.cat(header))

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tokens:
        """Some of the samples, in the order of ``rows``."""
        notes = None if self.notes is None else self.notes[rows]
        remarks = None if self.remarks is None else {name: counts[rows] for name, counts in self.remarks.items()}
        return Tokens(self.ids[rows], self.lengths[rows], self.header[rows], notes, remarks)

    @property
    def counted(self) -> Tensor:
        """bool [B, L]: which elements count."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    def split(self, size: int) -> Iterator[Tokens]:
        """The same in batches of ``size`` samples."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on another device."""
        notes = None if self.notes is None else self.notes.to(device)
        return Tokens(self.ids.to(device), self.lengths.to(device), self.header.to(device), notes, self.remarks)

    def prefix(self, length: int) -> Tokens:
        """The first ``length`` elements of every sample."""
        notes = None if self.notes is None else self.notes[:, :length]
        return Tokens(self.ids[:, :length], self.lengths.clamp(max=length), self.header, notes, self.remarks)
