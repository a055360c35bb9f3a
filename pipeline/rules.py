"""Checks of a config: values outside their range (``pipeline/ranges.py``) and parts that cannot work together.

To reject another combination, add an entry to ``ILLEGAL``. Only a rule that builds a layout imports torch; all others
are checked before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from data.errors import InputError
from data.remote import is_remote
from pipeline.ranges import get, out_of_range
from stages.factory import build_tokenizer
from stages.prior.config import CONFIDENCE_NOISE, FIXED_ORDERS, LIST_ORDERS, PREFIX_ORDERS
from stages.spectral.names import WAVELETS, is_wavelet

if TYPE_CHECKING:
    from pipeline.config import Config

Rule = tuple[Callable[["Config"], bool], Callable[["Config"], str]]
"""(function that returns True for an invalid config, function that returns one line on what to change)"""


def averages(config: Config) -> bool:
    """Whether the prior has moving averages between its layers."""
    return get(config, "prior.averaging") not in (None, "none")


def misplaced(config: Config) -> str | None:
    """Why the layout of the tokenizer does not support ``prior.order``; None if it does."""
    order = get(config, "prior.order")
    if config.prior.kind != "transformer" or order in ("natural", "reversed"):
        return None
    import torch

    from stages.prior.order import permutation_of

    try:
        with torch.device("meta"):
            size = (config.images.size, config.images.size)
            layout = build_tokenizer(config.tokenizer, size, config.images.channels).layout
    except InputError:  # values that do not fit the tokenizer: building it reports them
        return None
    try:
        permutation_of(layout, order)
    except InputError as error:
        return f"{error} (tokenizer.kind={config.tokenizer.kind})"
    return None


_WRITES_TO_FOLDERS: Rule = (
    lambda c: is_remote(c.tokens.path),
    lambda c: f"tokens.path={c.tokens.path}: this command writes to a folder; give one, then copy it to the URL",
)

# Combinations of parts that cannot work together.
ILLEGAL: list[Rule] = [
    (
        lambda c: len(c.images.crop_scale) != 2 or not 0 < c.images.crop_scale[0] <= c.images.crop_scale[1] <= 1,
        lambda c: f"images.crop_scale={c.images.crop_scale}; allowed: two fractions of the area, 0 < low <= high <= 1",
    ),
    (
        lambda c: c.images.kind in ("folder", "webdataset") and c.images.path is None,
        lambda c: f"images.path is not set; images.kind={c.images.kind} needs images.path=<location of your images>",
    ),
    (
        lambda c: c.trainer.devices == 0 or c.trainer.devices < -1,
        lambda c: f"trainer.devices={c.trainer.devices}; allowed: 1 or more, or -1 for every GPU",
    ),
    (
        lambda c: c.sampling.guidance != 1 and (c.condition.kind == "none" or c.condition.dropout == 0),
        lambda c: (
            f"sampling.guidance={c.sampling.guidance} with condition.kind={c.condition.kind} and condition.dropout="
            f"{c.condition.dropout}: guidance needs a condition with dropout in training; set sampling.guidance=1"
        ),
    ),
    (
        lambda c: "text" in c.condition.kind and c.tokens.text_encoder == "none",
        lambda c: (
            f"condition.kind={c.condition.kind} with tokens.text_encoder=none: captions need an encoder; set "
            "tokens.text_encoder=minilm or words, or condition.kind=class"
        ),
    ),
    (
        lambda c: (c.tokenizer.kind == "sparse-dct") != (c.prior.kind == "chunked"),
        lambda c: (
            f"tokenizer.kind={c.tokenizer.kind} with prior.kind={c.prior.kind}: lists need a chunked "
            f"prior, and it needs lists; set prior.kind={'chunked' if c.prior.kind != 'chunked' else 'transformer'}"
        ),
    ),
    (
        lambda c: c.images.channels == 3 and get(c, "tokenizer.chroma") == "4:2:0" and get(c, "prior.patch") % 2 == 1,
        lambda c: (
            f"prior.patch={get(c, 'prior.patch')} with tokenizer.chroma=4:2:0: a patch must contain whole chroma "
            "blocks; set prior.patch to an even number"
        ),
    ),
    (
        lambda c: c.eval.num_colorized > 0 and get(c, "prior.order") != "luma_first",
        lambda c: (
            f"eval.num_colorized={c.eval.num_colorized} with prior.order={get(c, 'prior.order') or 'natural'}: "
            "colorization needs a prior that writes luma first; set prior.order=luma_first, or eval.num_colorized=0"
        ),
    ),
    (
        lambda c: c.eval.upsample_from > 0 and get(c, "prior.order") not in (None, *PREFIX_ORDERS),
        lambda c: (
            f"eval.upsample_from={c.eval.upsample_from} with prior.order={get(c, 'prior.order')}: upsampling needs an "
            "order that starts with the coarse scales; set prior.order=natural, or eval.upsample_from=0"
        ),
    ),
    (
        lambda c: bool(c.eval.edit_frozen) and get(c, "prior.order") not in (None, *PREFIX_ORDERS),
        lambda c: (
            f"eval.edit_frozen={c.eval.edit_frozen} with prior.order={get(c, 'prior.order')}: editing needs an order "
            "that starts with the coarse scales; set prior.order=natural, or eval.edit_frozen=[]"
        ),
    ),
    (
        lambda c: c.prior.kind == "transformer" and get(c, "prior.order") not in FIXED_ORDERS,
        lambda c: (
            f"prior.order={get(c, 'prior.order')!r}; allowed with prior.kind=transformer: {', '.join(FIXED_ORDERS)}"
        ),
    ),
    (
        lambda c: c.prior.kind == "chunked" and get(c, "prior.order") not in LIST_ORDERS,
        lambda c: f"prior.order={get(c, 'prior.order')!r}; allowed with prior.kind=chunked: {', '.join(LIST_ORDERS)}",
    ),
    (
        lambda c: c.tokenizer.kind == "bitplane" and get(c, "prior.order") != "natural",
        lambda c: (
            f"prior.order={get(c, 'prior.order')} with tokenizer.kind=bitplane: the position of an element in a stream "
            "depends on all earlier elements; set prior.order=natural"
        ),
    ),
    (
        lambda c: get(c, "prior.order") == "scale" and averages(c),
        lambda c: (
            f"prior.averaging={get(c, 'prior.averaging')} with prior.order=scale: all elements of a scale are "
            "predicted at once, so there are no earlier ones to average; set prior.averaging=none"
        ),
    ),
    (
        lambda c: (
            get(c, "prior.order") == "interleaved" and averages(c) and get(c, "prior.averaging_borders") != "sample"
        ),
        lambda c: (
            f"prior.averaging_borders={get(c, 'prior.averaging_borders')} with prior.order=interleaved: scales are not "
            "contiguous; set prior.averaging_borders=sample"
        ),
    ),
    (
        lambda c: get(c, "prior.order") == "scale" and c.sampling.compile,
        lambda c: (
            "sampling.compile=true with prior.order=scale: its steps have many shapes; leave sampling.compile out"
        ),
    ),
    (
        lambda c: (
            get(c, "prior.order") != "scale"
            and (bool(c.sampling.rounds) or c.sampling.confidence_noise != CONFIDENCE_NOISE)
        ),
        lambda c: (
            f"sampling.rounds={c.sampling.rounds}, sampling.confidence_noise={c.sampling.confidence_noise} with "
            f"prior.order={get(c, 'prior.order')}: this order has no rounds; leave them out, or set "
            "prior.order=scale"
        ),
    ),
    (
        lambda c: get(c, "tokenizer.transform") not in (None, "identity") and not is_wavelet(c.tokenizer.transform),  # type: ignore[attr-defined]
        lambda c: f"tokenizer.transform={get(c, 'tokenizer.transform')!r}; allowed: identity, {WAVELETS}",
    ),
    (
        lambda c: get(c, "tokenizer.transform") == "identity" and get(c, "tokenizer.scales") != 1,
        lambda c: (
            f"tokenizer.scales={get(c, 'tokenizer.scales')} with tokenizer.transform=identity, which has one scale; "
            "set tokenizer.scales=1"
        ),
    ),
    (
        lambda c: not 0 <= (get(c, "tokenizer.overlap") or 0) <= (get(c, "tokenizer.patch") or 0),
        lambda c: (
            f"tokenizer.overlap={get(c, 'tokenizer.overlap')}; allowed: 0 to tokenizer.patch="
            f"{get(c, 'tokenizer.patch')}"
        ),
    ),
    (
        lambda c: get(c, "tokenizer.planes") == "ycbcr" and c.images.channels == 1,
        lambda c: (
            "tokenizer.planes=ycbcr with images.channels=1: gray images have no chroma; set images.channels=3, or "
            "tokenizer.planes=all"
        ),
    ),
    (
        lambda c: get(c, "tokenizer.planes") == "ycbcr" and (get(c, "tokenizer.groups") or 1) > 1,
        lambda c: (
            f"tokenizer.groups={get(c, 'tokenizer.groups')} with tokenizer.planes=ycbcr: luma and chroma already are "
            "groups; set tokenizer.groups=1, or tokenizer.planes=all"
        ),
    ),
    (
        lambda c: c.eval.num_colorized > 0 and get(c, "tokenizer.planes") == "all",
        lambda c: (
            f"eval.num_colorized={c.eval.num_colorized} with tokenizer.planes=all: colorization needs separate tokens "
            "for luma and chroma; set tokenizer.planes=ycbcr, or eval.num_colorized=0"
        ),
    ),
    (
        lambda c: c.tokenizer_training.oversampling > 1 and get(c, "tokenizer.head.kind") in (None, "none"),
        lambda c: (
            f"tokenizer_training.oversampling={c.tokenizer_training.oversampling} without a head: only a head learns "
            "from larger images; set tokenizer.head.kind=wavelet, or oversampling=1"
        ),
    ),
    (
        lambda c: c.tokenizer_training.oversampling == 1 and get(c, "tokenizer.head.kind") not in (None, "none"),
        lambda c: (
            f"tokenizer.head.kind={get(c, 'tokenizer.head.kind')} with tokenizer_training.oversampling=1: a head "
            "learns other sizes from larger images; set oversampling to 2 or more"
        ),
    ),
    (
        lambda c: c.tokenizer_training.oversampling > 1 and c.images.train_view in ("pad", "random_crop"),
        lambda c: (
            f"tokenizer_training.oversampling={c.tokenizer_training.oversampling} with images.train_view="
            f"{c.images.train_view}, which never resizes; set images.train_view=center or random_resized_crop"
        ),
    ),
    (
        lambda c: bool(c.eval.head_sizes) and get(c, "tokenizer.head.kind") in (None, "none"),
        lambda c: (
            f"eval.head_sizes={c.eval.head_sizes} without a head: set tokenizer.head.kind=wavelet, or "
            "eval.head_sizes=[]"
        ),
    ),
    (
        lambda c: not all(1 <= multiple <= 64 for multiple in c.eval.head_sizes),
        lambda c: f"eval.head_sizes={c.eval.head_sizes}; allowed: multiples of the image size, from 1 to 64",
    ),
    (
        lambda c: c.tokenizer_training.start_from is not None and get(c, "tokenizer.head.kind") in (None, "none"),
        lambda c: (
            f"tokenizer_training.start_from={c.tokenizer_training.start_from} without a head: nothing is left to "
            "train; set tokenizer.head.kind=wavelet"
        ),
    ),
    (
        lambda c: c.tokenizer_training.start_from is not None and c.tokenizer_training.adversarial_weight > 0,
        lambda c: (
            f"tokenizer_training.start_from with adversarial_weight={c.tokenizer_training.adversarial_weight}: the "
            "decoder is frozen, so an adversary has no effect; set tokenizer_training.adversarial_weight=0"
        ),
    ),
    (
        lambda c: get(c, "prior.averaging") == "learned" and get(c, "prior.averaging_borders") == "grid",
        lambda c: (
            "prior.averaging=learned with prior.averaging_borders=grid: learned windows are one-dimensional; set "
            "prior.averaging_borders=scale or sample"
        ),
    ),
    (
        lambda c: averages(c) and get(c, "prior.averaging_borders") != "sample" and c.tokenizer.kind == "nested",
        lambda c: (
            f"prior.averaging_borders={get(c, 'prior.averaging_borders')} with tokenizer.kind=nested: its scales have "
            "one token each and no grid; set prior.averaging_borders=sample"
        ),
    ),
    (
        lambda c: averages(c) and get(c, "prior.averaging_borders") != "sample" and c.tokenizer.kind == "bitplane",
        lambda c: (
            f"prior.averaging_borders={get(c, 'prior.averaging_borders')} with tokenizer.kind=bitplane: the scales of "
            "a stream have no fixed position; set prior.averaging_borders=sample"
        ),
    ),
    (
        lambda c: c.sampling.compile and averages(c),
        lambda c: (
            "sampling.compile=true with prior.averaging: moving averages cannot be compiled; leave one of them out"
        ),
    ),
    (
        lambda c: c.sampling.compile and c.prior.kind == "chunked",
        lambda c: "sampling.compile=true with prior.kind=chunked: it cannot be compiled; leave sampling.compile out",
    ),
    (
        lambda c: c.eval.num_colorized < 0 or c.eval.num_colorized == 1,
        lambda c: f"eval.num_colorized={c.eval.num_colorized}; allowed: 0, or 2 or more",
    ),
    (
        lambda c: c.trainer.strategy == "fsdp" and c.prior.kind == "chunked",
        lambda c: (
            "trainer.strategy=fsdp with prior.kind=chunked: processes may need different numbers of passes over a "
            "list, but fsdp gathers layers on all of them at once; set trainer.strategy=ddp"
        ),
    ),
]

# Rules of single commands, by the name of the command.
ILLEGAL_FOR: dict[str, list[Rule]] = {
    "train-tokenizer": [
        (
            lambda c: c.trainer.strategy == "fsdp",
            lambda c: (
                "trainer.strategy=fsdp: only train-prior supports it; train-tokenizer keeps the whole networks in each "
                "process; set trainer.strategy=ddp here"
            ),
        ),
    ],
    "cache-tokens": [_WRITES_TO_FOLDERS],
    "text-tokens": [_WRITES_TO_FOLDERS],
}


def broken_rule_for(command: str, config: Config) -> str | None:
    """Like ``broken_rule``, for the rules of one command."""
    return next((message(config) for refuses, message in ILLEGAL_FOR.get(command, []) if refuses(config)), None)


def broken_rule(config: Config) -> str | None:
    """One line that names an invalid value or combination and says what to change; None for a valid config."""
    combined = (message(config) for refuses, message in ILLEGAL if refuses(config))
    return out_of_range(config) or next(combined, None) or misplaced(config)
