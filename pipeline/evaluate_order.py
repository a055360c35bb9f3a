"""What eval finds out about the order of tokens: what each adds, how far it follows from earlier ones, its cost."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from data.layout import Tokens
from pipeline.evaluation_images import Images
from pipeline.models import Models
from pipeline.report_order import draw_order
from stages.contract import Tokenizer
from stages.measures.causality import FEWEST_IMAGES, MOST_INPUTS, measure_causality
from stages.measures.codes import CodeUse
from stages.measures.gains import measure_gains
from stages.measures.reconstruction import Reconstructed

GAINED_IMAGES = 256
"""Images of which every prefix is decoded."""


def measure_order(
    folder: Path,
    tokenizer: Tokenizer,
    models: Models | None,
    val: Images,
    made: Reconstructed,
    bits: list[float] | None,
    uses: list[CodeUse],
    batch_size: int,
    device: torch.device,
    skipped: list[str],
) -> dict[str, Any] | None:
    """R² of tokens from earlier ones, the prior's ``bits`` by position, and for nested tokens gain and ``uses``.

    Draws ``tokens.png``. None for streams and lists.
    """
    layout = tokenizer.layout
    if layout.ends != "fixed":
        return None
    order, others = "natural", {}
    permutation: list[int] | None = None
    if models is not None and models.prior.order not in ("natural", "scale"):
        order, elements = models.prior.order, torch.arange(layout.length)
        fields = elements[None, :, None].expand(-1, -1, layout.num_fields).to(models.device)
        permutation = models.prior.to_own_order(Tokens.fixed(fields)).ids[0, :, 0].tolist()
        others = {} if order == "reversed" else {order: permutation}
    causality = measure_causality(tokenizer, made.tokens, others)
    if causality is None:
        skipped.append(
            f"R² of tokens from earlier ones: it needs {FEWEST_IMAGES} images or more, and codes of at most "
            f"{MOST_INPUTS} numbers an image"
        )
    found: dict[str, Any] = {
        "tokens": layout.length,
        "causality": causality,
        "prior_order": None if models is None else models.prior.order,
        "permutation": permutation,
        "bits_by_position": bits,
        "gains": None,
    }
    if layout.decodes_prefixes and all(scale.length == 1 for scale in layout.scales):
        some = slice(GAINED_IMAGES)
        found["gains"] = measure_gains(tokenizer, val.pixels[some], made.tokens[some], batch_size, device)
        # of several fields the product: as if they told nothing of each other
        found["perplexity_by_position"] = [
            math.prod(use.perplexity for use in mine) for _, mine in groupby(uses, key=lambda use: use.scale)
        ]
    draw_order(found, folder / "tokens.png")
    return found
