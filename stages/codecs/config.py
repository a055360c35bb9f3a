"""The codecs' config sections ``tokenizer``, one dataclass a kind."""

from __future__ import annotations

from dataclasses import dataclass

from stages.tokenizer.config import TokenizerConfig


@dataclass
class BitplaneConfig(TokenizerConfig):
    """Wavelet bit-planes."""

    kind: str = "bitplane"
    wavelet: str = "bior4.4"
    """haar, or bior4.4 (CDF 9/7, as in JPEG 2000)."""
    variant: str = "blocks"
    """blocks: one token for a block of 4x4 or a group of 2x2 without significance; zerotree: one for a coefficient and
    all of the finer ones at its place."""
    final_threshold: float = 0.0625
    """Threshold of the last plane, for pixels in [0, 1]: a power of two, and the quality. Lower is finer."""
    start_threshold: float = 0.0
    """Threshold of the first plane; 0 takes each image's own, which its header then says."""


@dataclass
class SparseDCTConfig(TokenizerConfig):
    """Sparse lists of DCT coefficients."""

    kind: str = "sparse-dct"
    quality: int = 50
    """JPEG's, from 1 to 100."""
    block: int = 8
    """Side of a block in pixels: 2, 4, 8 or 16. JPEG has 8."""
    chroma: str = "4:2:0"
    """4:2:0: chroma at half the sides; 4:4:4: at full size. Of no matter for gray images."""
    chroma_upsampling: str = "triangle"
    """How halved chroma is doubled again: triangle (libjpeg's filter) or nearest (each sample repeated)."""
    largest_value: int = 0
    """Largest quantised value, positive or negative; what lies beyond is clipped, and counted in the manifest. 0: the
    largest in the images that are measured (tokenizer_training.fit_images)."""
    max_length: int = 0
    """Elements of a list, with its end; 0: as many as there are coefficients."""
    overflow: str = "refuse"
    """An image whose list is longer than that: refuse it by name, or code it at a lower quality, halved until it
    fits, which the manifest counts."""
