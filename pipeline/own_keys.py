"""The commands' own keys, those without a section: one dataclass a command.

They stand apart from the commands so that ``python -m pipeline`` knows them, and refuses a wrong one, before a command
loads what it works with.
"""

from __future__ import annotations

from dataclasses import dataclass

EXACT_ROUNDS = 3
DETAIL = 0.6


@dataclass
class Request:
    """What every command that draws images understands."""

    classes: str = ""
    """Class names or ids, comma-separated; empty: none, but for sample every class where no text is given."""
    text: str = ""
    """Captions, separated by |; empty: none."""
    count: int = 4
    """Images of each class and caption, and of each input."""
    seed: int = 0
    """Image i is drawn with seed + i."""


@dataclass
class SampleRequest(Request):
    """What to sample."""

    out: str = "${run}/samples"
    """Folder for grid.png and the single images."""


@dataclass
class ReconstructRequest:
    """What to reconstruct."""

    input: str = ""
    """An image, or a folder of images. Each is resized as a whole to the tokenizer's square first."""
    size: str = ""
    """Height x width of the result, e.g. 300x517, or one number for a square; empty: the tokenizer's own."""
    crop: str = ""
    """top,left,height,width of the part of the result that is wanted; empty: all of it."""
    out: str = "${run}/reconstructed"
    """Folder for one PNG an image."""


@dataclass
class UpsampleRequest(Request):
    """What to enlarge."""

    input: str = ""
    """An image, or a folder of images; square, and as large as one of the scales decodes to."""
    to: int = 0
    """Side of the result in pixels, one of the scales'; 0: the full size."""
    exact: int = EXACT_ROUNDS
    """Rounds of back-projection that draw the result to what reduces to the input; 0 leaves it as decoded."""
    detail: float = DETAIL
    """1: the sampled detail at full strength; less blends it with bicubic interpolation, which is 0."""
    out: str = "${run}/upsampled"
    """Folder for sheet.png and the single images."""


@dataclass
class ColorizeRequest(Request):
    """What to colour."""

    input: str = ""
    """A gray image, or a folder of them; cut and resized like the run's own."""
    color: str = "refuse"
    """What to do with an input that has colour: refuse it, or drop its colour."""
    out: str = "${run}/colorized"
    """Folder for sheet.png and the single images."""


@dataclass
class EditRequest(Request):
    """What to edit, and how much of it."""

    input: str = ""
    """An image, or a folder of images; cut and resized like the run's own."""
    frozen: str = "1"
    """Scales to keep; several, comma-separated, give the rows of the contact sheet. 0 needs a mask."""
    guidances: str = ""
    """Guidance values, comma-separated, for the columns; empty: sampling.guidance."""
    mask: str = ""
    """An image of the input's size: the scales that are not frozen change only where it is white."""
    out: str = "${run}/edited"
    """Folder for the contact sheets and the single images."""


@dataclass
class ExportRequest:
    """What to export, and where to."""

    out: str = "${run}/export"
    """Folder to write; an earlier export there is replaced, anything else is left alone."""
    programs: bool = False
    """Also write encoder and decoder as programs of torch.export, of learned tokenizers."""
    license: str = "unknown"
    """Licence of the weights as Hugging Face names it, e.g. mit or cc-by-4.0; it is the publisher's to choose."""


@dataclass
class StudioRequest:
    """Where the page is served."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, and there is no password."""
    port: int = 0
    """0: the first free one from 7860."""


@dataclass
class RatesRequest:
    """What to compare."""

    runs: str = ""
    """Folders of evaluations (with metrics.json), comma-separated, of the same held-out images."""
    out: str = "${run}/rates"
    """Folder for rates.json and rates.png."""


@dataclass
class OrdersRequest:
    """What to compare."""

    runs: str = ""
    """Folders of evaluations (with metrics.json), comma-separated, of the same held-out images."""
    out: str = "${run}/orders"
    """Folder for orders.json and orders.png."""


@dataclass
class SweepRequest:
    """The grid: every combination of these."""

    guidances: str = ""
    """Comma-separated; empty: the config's own."""
    temperatures: str = ""
    """Comma-separated; empty: the config's own."""
    top_ks: str = ""
    """Comma-separated, 0 for all ids; empty: the config's own."""
    out: str = "${run}/sweep"
    """Folder for sweep.json, sweep.md and sweep.png."""


@dataclass
class BenchRequest:
    """What to measure, and how often."""

    parts: str = "all"
    """Comma-separated: transforms, tokenizer, training, cache, reader, prior, sampling; or all."""
    repeats: int = 5
    """Timed runs of each task, in turn with those that it is compared with; one more comes first, untimed."""
    memory: str = ""
    """Image sides, comma-separated, at which the memory of a prior over lists is measured; empty: none."""
    out: str = "${run}/bench.json"
    """Where the figures go."""


@dataclass
class PlanRequest:
    """The machines."""

    gpus: int = 8
    """How many."""
    teraflops: float = 989.0
    """Peak of one, in TFLOP/s of dense bfloat16 products; 989 is an H100 SXM's by its data sheet."""
    utilisation: float = 0.4
    """Share of the peak that training reaches; measure it where the GPUs are."""
    images: int = 1_281_167
    """Training images, for the cache; ImageNet's by default."""
    out: str = "${run}/plan.json"
    """Where the figures go."""


@dataclass
class TextTokensRequest:
    """What to cut, and into how long pieces."""

    file: str = ""
    """A text of any encoding."""
    length: int = 256
    """Bytes of a sample."""
    held_out: float = 0.05
    """Share of the pieces, the last ones, that validate."""
