"""Keys of single commands, outside the config sections: one dataclass per command.

They are not defined in the modules of the commands, so that ``python -m pipeline`` can reject a wrong key before it
imports a command.
"""

from __future__ import annotations

from dataclasses import dataclass

EXACT_ROUNDS = 3
DETAIL = 0.6


@dataclass
class Request:
    """Keys of all commands that sample images."""

    classes: str = ""
    """Class names or ids, comma-separated; empty: none, except for ``sample`` without text: all classes."""
    text: str = ""
    """Captions, separated by |; empty: none."""
    count: int = 4
    """Number of images for each class and caption, and for each input."""
    seed: int = 0
    """Image i is sampled with seed + i."""


@dataclass
class SampleRequest(Request):
    """Keys of ``sample``."""

    out: str = "${run}/samples"
    """Folder for grid.png and single images."""


@dataclass
class ReconstructRequest:
    """Keys of ``reconstruct``."""

    input: str = ""
    """An image or a folder of images. Each is first resized, without cropping, to the square of the tokenizer."""
    size: str = ""
    """Height x width of the result, e.g. 300x517, or one number for a square; empty: the size of the tokenizer."""
    crop: str = ""
    """Part of the result to keep, as top,left,height,width; empty: all of it."""
    out: str = "${run}/reconstructed"
    """Folder for one PNG per image."""


@dataclass
class UpsampleRequest(Request):
    """Keys of ``upsample``."""

    input: str = ""
    """An image or a folder of images; square, with the size of one of the scales."""
    to: int = 0
    """Side of the result in pixels, the size of one of the scales; 0: the full size."""
    exact: int = EXACT_ROUNDS
    """Rounds of back-projection, which make the result consistent with the input; 0: no back-projection."""
    detail: float = DETAIL
    """Weight of the sampled detail, from 0 (bicubic interpolation) to 1 (full strength)."""
    out: str = "${run}/upsampled"
    """Folder for sheet.png and single images."""


@dataclass
class ColorizeRequest(Request):
    """Keys of ``colorize``."""

    input: str = ""
    """A gray image or a folder of gray images; cropped and resized like the images of the run."""
    color: str = "refuse"
    """What to do with an input in color: refuse it, or drop its color."""
    out: str = "${run}/colorized"
    """Folder for sheet.png and single images."""


@dataclass
class EditRequest(Request):
    """Keys of ``edit``."""

    input: str = ""
    """An image or a folder of images; cropped and resized like the images of the run."""
    frozen: str = "1"
    """Number of scales to keep; several, comma-separated, give the rows of the contact sheet. 0 needs a mask."""
    guidances: str = ""
    """Guidance values for the columns, comma-separated; empty: sampling.guidance."""
    mask: str = ""
    """An image of the same size as the input: scales that are not frozen change only where it is white."""
    out: str = "${run}/edited"
    """Folder for contact sheets and single images."""


@dataclass
class ExportRequest:
    """Keys of ``export``."""

    out: str = "${run}/export"
    """Folder to write. An earlier export there is replaced; anything else is never overwritten."""
    programs: bool = False
    """Also write encoder and decoder as torch.export programs; only for learned tokenizers."""
    license: str = "unknown"
    """License of the weights, as named by Hugging Face, e.g. mit or cc-by-4.0. The publisher chooses it."""


@dataclass
class StudioRequest:
    """Keys of ``studio``."""

    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines connect; there is no password."""
    port: int = 0
    """0: the first free port from 7860."""


@dataclass
class RatesRequest:
    """Keys of ``rates``."""

    runs: str = ""
    """Evaluation folders (with metrics.json), comma-separated, with the same held-out images."""
    out: str = "${run}/rates"
    """Folder for rates.json and rates.png."""


@dataclass
class OrdersRequest:
    """Keys of ``orders``."""

    runs: str = ""
    """Evaluation folders (with metrics.json), comma-separated, with the same held-out images."""
    out: str = "${run}/orders"
    """Folder for orders.json and orders.png."""


@dataclass
class SweepRequest:
    """Keys of ``sweep``, which samples with every combination of the values."""

    guidances: str = ""
    """Comma-separated; empty: the value of the config."""
    temperatures: str = ""
    """Comma-separated; empty: the value of the config."""
    top_ks: str = ""
    """Comma-separated, 0 for all ids; empty: the value of the config."""
    out: str = "${run}/sweep"
    """Folder for sweep.json, sweep.md and sweep.png."""


@dataclass
class BenchRequest:
    """Keys of ``bench``."""

    parts: str = "all"
    """Comma-separated: transforms, tokenizer, training, cache, reader, prior, sampling; or all."""
    repeats: int = 5
    """Timed runs of each task, alternating with the tasks it is compared with, after one untimed run."""
    memory: str = ""
    """Image sides, comma-separated, at which to measure the memory of a prior over lists; empty: none."""
    out: str = "${run}/bench.json"
    """File for the results."""


@dataclass
class PlanRequest:
    """Keys of ``plan``."""

    gpus: int = 8
    """Number of GPUs."""
    teraflops: float = 989.0
    """Peak of one GPU, in TFLOP/s of dense bfloat16 matrix products; 989 is an H100 SXM (data sheet)."""
    utilisation: float = 0.4
    """Fraction of the peak that training reaches; measure it on your GPUs."""
    images: int = 1_281_167
    """Number of training images, for the cache; default: ImageNet."""
    out: str = "${run}/plan.json"
    """File for the results."""


@dataclass
class TextTokensRequest:
    """Keys of ``text-tokens``."""

    file: str = ""
    """A text file in any encoding."""
    length: int = 256
    """Bytes per sample."""
    held_out: float = 0.05
    """Fraction of the samples held out for validation, from the end of the text."""
