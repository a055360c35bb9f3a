"""State machine of bit-plane streams, compiled by numba if it is installed, otherwise plain Python.

The encoder knows all coefficients and writes the stream directly. Decoder and prior read a stream token by token with
``arrive``, ``allowed`` and ``consume``. The state of one stream is

- registers int64 [6]: index of the next coefficient, plane (0 is the first of the stream), and the state of the group
  and the block of that coefficient;
- approximation float64 [n]: 0 while a coefficient is insignificant;
- marks int16 [3, n] (zero-trees): the plane, counted from 1, in which a coefficient was last skipped; the plane in
  which it was last Insignificant without significant descendants; and 1 if a descendant is significant.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from numba import njit

    COMPILED = True
except ImportError:
    COMPILED = False

    def njit(**_: Any) -> Callable[[Any], Any]:  # type: ignore[no-redef]
        """Replacement without numba: returns the function unchanged."""
        return lambda function: function


def warn_if_slow() -> None:
    """Warn if numba is missing, so the code is not compiled."""
    if not COMPILED:
        warnings.warn(
            "numba is not installed: bit-planes are coded about twenty times slower; pip install 'octaves[codecs]'",
            stacklevel=3,
        )


PLACE, PLANE, GROUP_OPEN, GROUP_ZEROS, BLOCK_OPEN, BLOCK_ZEROS = range(6)
REGISTERS = 6
SKIPPED, OPENED, ABOVE = range(3)
GROUP4, GROUP2 = 0, 1
"""Tokens of the variant blocks. The variant zerotree has ZEROTREE instead, and its other tokens are one lower."""
ZEROTREE = 0
# the following tokens, in both variants
INSIGNIFICANT, POSITIVE, NEGATIVE, LOWER, UPPER = range(5)


@njit(cache=True, nogil=True)
def arrive(registers, approximation, marks, parent, child, zerotree, planes):  # type: ignore[no-untyped-def]
    """Advance to the next coefficient that has a token and update the registers. False at the end of the stream."""
    size = len(approximation)
    while True:
        place, plane = registers[PLACE], registers[PLANE]
        if plane >= planes:
            return False
        if place == size:
            registers[PLACE], registers[PLANE] = 0, plane + 1
            continue
        if not zerotree or marks[SKIPPED, place] != plane + 1:
            break
        if child[place] >= 0:
            for index in range(child[place], child[place] + 4):
                marks[SKIPPED, index] = plane + 1
        registers[PLACE] = place + 1
    if place % 4 == 0:
        registers[GROUP_ZEROS] = 0
        if zerotree:
            registers[GROUP_OPEN] = parent[place] >= 0 and marks[OPENED, parent[place]] == plane + 1
        else:
            registers[GROUP_OPEN] = 1
            for index in range(place, place + 4):
                if approximation[index] != 0:
                    registers[GROUP_OPEN] = 0
            if place % 16 == 0:
                registers[BLOCK_ZEROS] = 0
                registers[BLOCK_OPEN] = 1
                for index in range(place, place + 16):
                    if approximation[index] != 0:
                        registers[BLOCK_OPEN] = 0
    return True


@njit(cache=True, nogil=True)
def allowed(registers, approximation, marks, child, zerotree, strict):  # type: ignore[no-untyped-def]
    """Bit mask of allowed tokens; without ``strict``, tokens ruled out only by earlier tokens are also allowed."""
    place = registers[PLACE]
    base = 1 if zerotree else 2
    if approximation[place] != 0:
        return (1 << (base + LOWER)) | (1 << (base + UPPER))
    bits = (1 << (base + INSIGNIFICANT)) | (1 << (base + POSITIVE)) | (1 << (base + NEGATIVE))
    last = strict and place % 4 == 3 and registers[GROUP_OPEN] and registers[GROUP_ZEROS] == 3
    if zerotree:
        if child[place] >= 0 and marks[ABOVE, place] == 0:
            if not last:
                bits |= 1 << ZEROTREE
        elif last:
            bits &= ~(1 << (base + INSIGNIFICANT))
        return bits
    if last:
        bits &= ~(1 << (base + INSIGNIFICANT))
    if place % 4 == 0 and registers[GROUP_OPEN]:
        if place % 16 == 0 and registers[BLOCK_OPEN]:
            bits |= 1 << GROUP4
        if not (strict and place % 16 == 12 and registers[BLOCK_OPEN] and registers[BLOCK_ZEROS] == 3):
            bits |= 1 << GROUP2
    return bits


@njit(cache=True, nogil=True)
def consume(registers, approximation, marks, parent, child, zerotree, threshold, token):  # type: ignore[no-untyped-def]
    """Update the state with an allowed token. ``threshold`` is that of its plane."""
    place = registers[PLACE]
    base = 1 if zerotree else 2
    step = 1
    if token >= base + LOWER:
        value = approximation[place]
        increase = (token == base + UPPER) == (value > 0)
        approximation[place] = value + (threshold / 2 if increase else -threshold / 2)
    elif token > base + INSIGNIFICANT:
        approximation[place] = 1.5 * threshold if token == base + POSITIVE else -1.5 * threshold
        if zerotree:
            above = parent[place]
            while above >= 0 and marks[ABOVE, above] == 0:
                marks[ABOVE, above] = 1
                above = parent[above]
    elif zerotree:
        if child[place] < 0:
            registers[GROUP_ZEROS] += 1
        elif token == ZEROTREE:
            registers[GROUP_ZEROS] += 1
            for index in range(child[place], child[place] + 4):
                marks[SKIPPED, index] = registers[PLANE] + 1
        elif marks[ABOVE, place] == 0:
            marks[OPENED, place] = registers[PLANE] + 1
    elif token == base + INSIGNIFICANT:
        registers[GROUP_ZEROS] += 1
    else:
        step = 16 if token == GROUP4 else 4
        registers[BLOCK_ZEROS] += 1
    registers[PLACE] = place + step


@njit(cache=True, nogil=True)
def encode(values, planes, final, child, zerotree, ids):  # type: ignore[no-untyped-def]
    """Encode coefficients float64 [N, n] with ``planes`` [N] into ids uint8 [N, L]; returns lengths int64 [N]."""
    count, size = values.shape
    lengths = np.zeros(count, np.int64)
    # largest absolute value of a coefficient and its descendants, of a group, of a block
    trees, groups, blocks = np.empty(size), np.empty(size // 4), np.empty(size // 16)
    for row in range(count):
        groups[:], blocks[:] = 0, 0
        for place in range(size - 1, -1, -1):
            largest = abs(values[row, place])
            groups[place // 4] = max(groups[place // 4], largest)
            blocks[place // 16] = max(blocks[place // 16], largest)
            if child[place] >= 0:
                for descendant in range(child[place], child[place] + 4):
                    largest = max(largest, trees[descendant])
            trees[place] = largest
        approximation = np.zeros(size)
        skipped = np.zeros(size, np.int16)
        length = 0
        for plane in range(planes[row]):
            threshold = final * 2.0 ** (planes[row] - 1 - plane)
            place = 0
            while place < size:
                if zerotree:
                    step = 1
                    is_skipped = skipped[place] == plane + 1
                    is_zero_tree = child[place] >= 0 and trees[place] < threshold
                    if is_skipped or is_zero_tree:
                        if child[place] >= 0:
                            skipped[child[place] : child[place] + 4] = plane + 1
                        if not is_skipped:
                            ids[row, length] = ZEROTREE
                            length += 1
                    else:
                        ids[row, length] = refine(values[row, place], approximation, place, threshold, 1)
                        length += 1
                else:
                    step = 16 if place % 16 == 0 and blocks[place // 16] < threshold else 1
                    if step == 1 and place % 4 == 0 and groups[place // 4] < threshold:
                        step = 4
                    if step == 1:
                        ids[row, length] = refine(values[row, place], approximation, place, threshold, 2)
                    else:
                        ids[row, length] = GROUP4 if step == 16 else GROUP2
                    length += 1
                place += step
        lengths[row] = length
    return lengths


@njit(cache=True, nogil=True)
def refine(value, approximation, place, threshold, base):  # type: ignore[no-untyped-def]
    """The token of a single coefficient. Updates its approximation."""
    current = approximation[place]
    if current != 0:
        upper = abs(value) > abs(current)
        approximation[place] += threshold / 2 if upper == (current > 0) else -threshold / 2
        return base + (UPPER if upper else LOWER)
    if abs(value) < threshold:
        return base + INSIGNIFICANT
    approximation[place] = 1.5 * threshold if value > 0 else -1.5 * threshold
    return base + (POSITIVE if value > 0 else NEGATIVE)


@njit(cache=True, nogil=True)
def decode(ids, lengths, planes, final, parent, child, zerotree, values):  # type: ignore[no-untyped-def]
    """Decode streams into coefficients ``values`` float64 [N, n].

    Returns (row, position) of the first invalid token, or (-1, -1).
    """
    count, size = values.shape
    for row in range(count):
        registers = np.zeros(REGISTERS, np.int64)
        marks = np.zeros((3, size if zerotree else 1), np.int16)
        approximation = values[row]
        approximation[:] = 0
        for position in range(lengths[row]):
            token = ids[row, position]
            going = arrive(registers, approximation, marks, parent, child, zerotree, planes[row])
            if not going or token < 0 or token > 7:
                return row, position
            if not allowed(registers, approximation, marks, child, zerotree, True) & (1 << token):
                return row, position
            threshold = final * 2.0 ** (planes[row] - 1 - registers[PLANE])
            consume(registers, approximation, marks, parent, child, zerotree, threshold, token)
    return -1, -1


@njit(cache=True, nogil=True)
def note(registers, approximation, marks, child, zerotree, neighbours, threshold, first_plane, out):  # type: ignore[no-untyped-def]
    """Write the notes before the next token into ``out`` int32 [4 + Q]; see ``BitplaneGrammar``."""
    place = registers[PLACE]
    out[0] = place
    out[1] = first_plane + registers[PLANE]
    out[2] = allowed(registers, approximation, marks, child, zerotree, True)
    out[3] = allowed(registers, approximation, marks, child, zerotree, False)
    for index in range(neighbours.shape[1]):
        neighbor = neighbours[place, index]
        code = 0
        if neighbor >= 0 and approximation[neighbor] != 0:
            code = 1 + int(math.floor(math.log2(abs(approximation[neighbor]) / threshold)))
            if approximation[neighbor] < 0:
                code = -code
        out[4 + index] = code


@njit(cache=True, nogil=True)
def annotate(ids, lengths, planes, total, final, parent, child, neighbours, zerotree, notes):  # type: ignore[no-untyped-def]
    """Write notes int32 [N, L, 4 + Q] of streams; returns (row, position) of the first invalid token, or (-1, -1)."""
    size = len(parent)
    for row in range(ids.shape[0]):
        registers = np.zeros(REGISTERS, np.int64)
        marks = np.zeros((3, size if zerotree else 1), np.int16)
        approximation = np.zeros(size, np.float64)
        for position in range(lengths[row]):
            if not arrive(registers, approximation, marks, parent, child, zerotree, planes[row]):
                return row, position
            threshold = final * 2.0 ** (planes[row] - 1 - registers[PLANE])
            out = notes[row, position]
            first_plane = total - planes[row]
            note(registers, approximation, marks, child, zerotree, neighbours, threshold, first_plane, out)
            token = ids[row, position]
            if token < 0 or token > 7 or not out[2] & (1 << token):
                return row, position
            consume(registers, approximation, marks, parent, child, zerotree, threshold, token)
    return -1, -1


@njit(cache=True, nogil=True)
def advance(  # type: ignore[no-untyped-def]
    tokens, going, registers, approximation, marks, planes, total, final, parent, child, neighbours, zerotree, notes
):
    """Append one token [N] to each stream that is ``going`` [N] (token -1: none, at the start), then write its notes.

    Returns the first row with an invalid token, or -1.
    """
    for row in range(len(tokens)):
        if not going[row]:
            continue
        token = tokens[row]
        if token >= 0:
            if token > 7 or not notes[row, 2] & (1 << token):
                return row
            threshold = final * 2.0 ** (planes[row] - 1 - registers[row, PLANE])
            consume(registers[row], approximation[row], marks[row], parent, child, zerotree, threshold, token)
        going[row] = arrive(registers[row], approximation[row], marks[row], parent, child, zerotree, planes[row])
        if going[row]:
            threshold = final * 2.0 ** (planes[row] - 1 - registers[row, PLANE])
            first_plane = total - planes[row]
            note(
                registers[row],
                approximation[row],
                marks[row],
                child,
                zerotree,
                neighbours,
                threshold,
                first_plane,
                notes[row],
            )
        else:
            notes[row] = 0
    return -1
