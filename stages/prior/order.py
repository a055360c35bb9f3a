"""Order in which a prior writes a layout of fixed length: a permutation of the cached (layout) order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data.errors import InputError
from data.layout import TokenLayout
from stages.prior.config import FIXED_ORDERS


def permutation_of(layout: TokenLayout, order: str) -> list[int]:
    """Layout element at each position of ``order``.

    - natural, scale: the layout's order;
    - reversed: from the last element to the first;
    - interleaved: place by place in raster order, with all scales of a place together, coarse to fine. If grids differ,
      places are the cells of the coarsest grid and a finer scale has several elements per place. Refused if the result
      equals the natural order;
    - luma_first: luma scales, then the other scales, each in natural order.

    Raises InputError for an order that the layout does not support.
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
                "prior.order=interleaved is the natural order of these tokens: they have only one scale or one shared "
                "place; set prior.order=natural"
            )
        return sorted(elements, key=keys.__getitem__)
    if order == "luma_first":
        planes = [scale.planes for scale in layout.scales for _ in range(scale.length)]
        if not {"luma", "chroma"} <= set(planes):
            raise InputError(
                "prior.order=luma_first needs scales of luma and of chroma; these tokens have none, so set "
                "prior.order=natural"
            )
        return sorted(elements, key=lambda element: planes[element] != "luma")
    if order == "scale" and all(scale.length == 1 for scale in layout.scales):
        raise InputError(
            "prior.order=scale: these scales have one token each, so a step per scale would be a step per token; set "
            "prior.order=natural"
        )
    return elements


def _interleaved(layout: TokenLayout) -> list[tuple[int, int]]:
    """(row, column) of each element's place in the coarsest grid."""
    grids = [scale.grid for scale in layout.scales if scale.grid is not None]
    if len(grids) < len(layout.scales):
        raise InputError(
            "prior.order=interleaved needs tokens with a place, but these scales have no grid; set prior.order=natural"
        )
    rows, columns = min(grid[0] for grid in grids), min(grid[1] for grid in grids)
    if any(grid[0] % rows or grid[1] % columns for grid in grids):
        raise InputError(
            f"prior.order=interleaved: grids {sorted(set(grids))} have no places in common, as their sides do not "
            "divide each other; set prior.order=natural"
        )
    return [
        (row // (grid[0] // rows), column // (grid[1] // columns))
        for grid in grids
        for row in range(grid[0])
        for column in range(grid[1])
    ]


def scales_of(layout: TokenLayout, permutation: Sequence[int]) -> list[int]:
    """Scale of the element at each position."""
    natural = [number for number, scale in enumerate(layout.scales) for _ in range(scale.length)]
    return [natural[element] for element in permutation]


def reordered(layout: TokenLayout, permutation: Sequence[int]) -> TokenLayout:
    """The layout with its scales in this order. Raises InputError if the order splits a scale."""
    numbers = scales_of(layout, permutation)
    runs = [number for place, number in enumerate(numbers) if not place or numbers[place - 1] != number]
    if len(runs) != len(layout.scales):
        raise InputError("prior.averaging_borders: in this prior.order no scale is in one piece; allowed: sample")
    return replace(layout, scales=tuple(layout.scales[number] for number in runs))
