"""In which order a prior writes a layout of fixed length: a permutation. It is the prior's, the cache has another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data.errors import InputError
from data.layout import TokenLayout
from stages.prior.config import FIXED_ORDERS


def permutation_of(layout: TokenLayout, order: str) -> list[int]:
    """The element of the layout that stands at each position of the order.

    natural and scale: the layout's own. reversed: from its last element to the first. interleaved: place by place in
    raster order, at each place all scales, coarse to fine; where grids differ the places are those of the coarsest one,
    and a finer scale has several elements at each; not where that is the natural order. luma_first: scales of luma,
    then the others, each naturally.
    Raises InputError for an order that the layout does not have.
    """
    if order not in FIXED_ORDERS:
        raise InputError(f"prior.order={order!r}; allowed: {', '.join(FIXED_ORDERS)}")
    if order != "natural" and layout.ends != "fixed":
        raise InputError(f"prior.order={order!r}; allowed: natural, for streams")
    elements = list(range(layout.length))
    if order == "reversed":
        return elements[::-1]
    if order == "interleaved":
        keys = _interleaved(layout)
        if keys == sorted(keys):
            raise InputError(
                "prior.order=interleaved is the natural order of these tokens: they have one scale, or one place in "
                "common; set prior.order=natural"
            )
        return sorted(elements, key=keys.__getitem__)
    if order == "luma_first":
        planes = [scale.planes for scale in layout.scales for _ in range(scale.length)]
        if not {"luma", "chroma"} <= set(planes):
            raise InputError("prior.order=luma_first needs scales of luma and of chroma; these tokens have none")
        return sorted(elements, key=lambda element: planes[element] != "luma")
    if order == "scale" and all(scale.length == 1 for scale in layout.scales):
        raise InputError(
            "prior.order=scale: these scales have one token each, and a step for each scale would be one for each "
            "token; set prior.order=natural"
        )
    return elements


def _interleaved(layout: TokenLayout) -> list[tuple[int, int]]:
    """(row, column) among the places that all scales share, of each element."""
    grids = [scale.grid for scale in layout.scales if scale.grid is not None]
    if len(grids) < len(layout.scales):
        raise InputError("prior.order=interleaved needs tokens with a place; these scales have no grid")
    rows, columns = min(grid[0] for grid in grids), min(grid[1] for grid in grids)
    if any(grid[0] % rows or grid[1] % columns for grid in grids):
        raise InputError(
            f"prior.order=interleaved: grids {sorted(set(grids))} have no places in common; set prior.order=natural"
        )
    return [
        (row // (grid[0] // rows), column // (grid[1] // columns))
        for grid in grids
        for row in range(grid[0])
        for column in range(grid[1])
    ]


def scales_of(layout: TokenLayout, permutation: Sequence[int]) -> list[int]:
    """The scale of the element at each position."""
    natural = [number for number, scale in enumerate(layout.scales) for _ in range(scale.length)]
    return [natural[element] for element in permutation]


def reordered(layout: TokenLayout, permutation: Sequence[int]) -> TokenLayout:
    """The layout with its scales in this order. Raises InputError where a scale is not in one piece."""
    numbers = scales_of(layout, permutation)
    runs = [number for place, number in enumerate(numbers) if not place or numbers[place - 1] != number]
    if len(runs) != len(layout.scales):
        raise InputError("prior.averaging_borders: in this prior.order no scale is in one piece; allowed: sample")
    return replace(layout, scales=tuple(layout.scales[number] for number in runs))
