"""What ``eval`` measures: one config section, ``eval``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EvalConfig:
    """Sizes and settings of an evaluation; every one is written beside the numbers."""

    name: str = "default"
    """The result goes to ``<run>/eval/<name>``."""
    num_images: int = 1000
    """Held-out images that are reconstructed and compared with; fewer where the set is smaller."""
    num_samples: int = 1000
    """Images sampled from the prior, classes in equal shares."""
    batch_size: int = 100
    """Images at once in reconstruction and sampling; changes speed only."""
    precision: str = "auto"
    """auto (bf16 where the hardware multiplies it), 32 or bf16: of tokenizer and prior while they are measured, and of
    the classifier's training. Features and distances stay in float32 and above."""
    seed: int = 0
    """Sample i is drawn with seed + i."""
    classifier: bool = True
    """Train a small classifier on the training images for class accuracy, coverage and memorisation."""
    classifier_steps: int = 1500
    """Its training steps of 128 images."""
    neighbours: int = 5
    """k of precision, recall, density and coverage: a neighbourhood reaches to the k-th nearest image of its set."""
    inception: str | None = None
    """File of Inception's weights as torch-fidelity ships them, for FID beside the other distances; none by default."""
    num_train_reference: int = 60000
    """Training images among which nearest neighbours are searched; the whole set where it is smaller."""
    grids: list[str] = field(default_factory=list)
    """Settings under which a grid of samples is shown besides, e.g. top_p=[0.6]: one key of sampling each."""
    baseline: str | None = None
    """Another tokenizer's safetensors, to be beaten at every rung of the ladder of resolutions; none by default."""
    timing_repeats: int = 5
    """Timed runs of sampling up to each rung; 0 leaves the timing out."""
    upsample_from: int = 0
    """Side in pixels of the small images that are upsampled, one of the scales'; 0 leaves upsampling out."""
    num_upsampled: int = 1000
    """Held-out images (of ``num_images``) that are reduced and upsampled."""
    head_sizes: list[float] = field(default_factory=list)
    """Multiples of the tokenizer's size at which its head is compared with larger photos; none leaves it out."""
    num_head: int = 200
    """Held-out images (of ``num_images``) that it is compared on, those stored large enough."""
    num_colorized: int = 0
    """Held-out images (of ``num_images``) whose luma is coloured anew; 0 leaves colouring out."""
    edit_frozen: list[int] = field(default_factory=list)
    """Numbers of scales to keep when held-out images are edited; none leaves editing out."""
    num_edited: int = 200
    """Held-out images (of ``num_images``) that are edited."""
