"""The config section ``eval``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EvalConfig:
    """Sizes and settings of an evaluation; all of them are stored with the results."""

    name: str = "default"
    """The result is written to ``<run>/eval/<name>``."""
    num_images: int = 1000
    """Held-out images for reconstruction and as the reference; fewer if the set is smaller."""
    num_samples: int = 1000
    """Images sampled from the prior, in equal numbers per class."""
    batch_size: int = 100
    """Batch size of reconstruction and sampling; affects speed only."""
    precision: str = "auto"
    """auto (bf16 if the hardware supports bf16 multiplication), 32 or bf16; applies to tokenizer and prior, and to the
    training of the classifier. Features and distances stay in float32 or float64."""
    seed: int = 0
    """Sample i is drawn with seed + i."""
    classifier: bool = True
    """Train a small classifier on the training images for class accuracy, coverage and memorization."""
    classifier_steps: int = 1500
    """Training steps of the classifier, with 128 images each."""
    neighbours: int = 5
    """k of precision, recall, density and coverage: a neighborhood reaches to the k-th nearest image of its set."""
    inception: str | None = None
    """File of Inception weights as shipped by torch-fidelity, to also measure FID; none by default."""
    num_train_reference: int = 60000
    """Training images for the nearest-neighbor search; the whole set if it is smaller."""
    grids: list[str] = field(default_factory=list)
    """Sampling settings for additional sample grids, e.g. top_p=[0.6]; one key of ``sampling`` each."""
    baseline: str | None = None
    """Safetensors file of another tokenizer to compare with at every rung of the resolution ladder; none by default."""
    timing_repeats: int = 5
    """Timed sampling runs per rung; 0 disables the timing."""
    upsample_from: int = 0
    """Side in pixels of the small images to upsample, which must be the side of a scale; 0 disables upsampling."""
    num_upsampled: int = 1000
    """Held-out images (out of ``num_images``) that are reduced and upsampled."""
    head_sizes: list[float] = field(default_factory=list)
    """Multiples of the tokenizer's size at which its head is compared with larger photos; empty disables it."""
    num_head: int = 200
    """Held-out images (out of ``num_images``) for that comparison; only images stored at a sufficient size."""
    num_colorized: int = 0
    """Held-out images (out of ``num_images``) that are colorized from their luma; 0 disables colorization."""
    edit_frozen: list[int] = field(default_factory=list)
    """Numbers of scales to keep when held-out images are edited; empty disables editing."""
    num_edited: int = 200
    """Held-out images (out of ``num_images``) that are edited."""
