"""Config section ``tokenizer`` of the codecs, one dataclass per kind."""

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
    """blocks: one token for an insignificant block of 4x4 or group of 2x2; zerotree: one token for an insignificant
    coefficient with all finer ones at its place."""
    final_threshold: float = 0.0625
    """Threshold of the last plane, for pixels in [0, 1]: a power of two. It sets the quality; lower is finer."""
    start_threshold: float = 0.0
    """Threshold of the first plane. 0 chooses it per image and stores the number of planes in the header."""


@dataclass
class SparseDCTConfig(TokenizerConfig):
    """Sparse lists of DCT coefficients."""

    kind: str = "sparse-dct"
    quality: int = 50
    """JPEG quality, from 1 to 100."""
    block: int = 8
    """Side of a block in pixels: 2, 4, 8 or 16. JPEG uses 8."""
    chroma: str = "4:2:0"
    """4:2:0: chroma at half width and height; 4:4:4: at full size. No effect on gray images."""
    chroma_upsampling: str = "triangle"
    """Upsampling of halved chroma: triangle (libjpeg's filter) or nearest (each sample repeated)."""
    largest_value: int = 0
    """Largest absolute quantized value. Larger values are clipped, and counted in the manifest. 0: the largest value in
    the measured images (tokenizer_training.fit_images)."""
    max_length: int = 0
    """Maximum elements of a list, including its end; 0: enough for all coefficients."""
    overflow: str = "refuse"
    """Images with longer lists: refuse raises an error that names the image; lower halves the quality until the list
    fits, and the manifest counts these images."""
