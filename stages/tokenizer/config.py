"""Stage 1's config sections: ``tokenizer`` (one dataclass a kind) and ``tokenizer_training``."""

from __future__ import annotations

from dataclasses import dataclass, field

from stages.tokenizer.parts import CosineVQConfig, HeadConfig, QuantizerConfig, TransformerConfig

PLANES = ("all", "ycbcr")
"""Which channels a token may hold."""


@dataclass
class TokenizerConfig:
    """What every tokenizer's section has."""

    kind: str = "sit"
    """Which tokenizer; picks the other keys of this section."""
    path: str = "${run}/tokenizer/tokenizer.safetensors"
    """Exported weights: written by train-tokenizer, read by every later command."""


@dataclass
class SITConfig(TokenizerConfig):
    """The Spectral Image Tokenizer."""

    kind: str = "sit"
    transform: str = "haar"
    """identity (one scale, pixels as they are), or the name of a wavelet in PyWavelets: haar, bior2.2 (LeGall 5/3) and
    bior4.4 (CDF 9/7) with mirrored borders, orthogonal ones such as db2, sym4 or coif1 with periodic ones. A small
    image is what the wavelet's low-pass filter leaves of a large one: the mean of squares with Haar alone."""
    scales: int = 4
    """S: one approximation and S - 1 levels of details."""
    patch: int = 2
    """Patch side of the approximation (of the image, with transform identity)."""
    overlap: int = 0
    """Coefficients that a token sees and writes beyond each side of a patch of the approximation, from 0 to ``patch``.
    Larger patches have more in proportion. Embedding and head of a scale grow by (1 + 2 overlap / patch) squared."""
    planes: str = "all"
    """all (a token holds all channels), or ycbcr: a scale of luma and one of chroma, with a quarter of the tokens."""
    attention: str = "sit"
    """sit (dense), sit-sc (scale-causal encoder and decoder), sit-scd (decoder only), sit-sce (encoder only)."""
    groups: int = 1
    """Consecutive groups of equally many tokens that stand in place of scales in scale-causal attention: what such a
    mask does to a raster. Only with transform identity, where the one scale is one group otherwise."""
    specialised: bool = True
    """ADTransformer: separate weights for approximation and detail tokens."""
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=TransformerConfig)
    quantizer: QuantizerConfig = field(default_factory=CosineVQConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    detail_head_gain: float = 0.1
    """Factor on the detail heads' first weights: the model starts as a blurred image."""


@dataclass
class ViTVQGANConfig(SITConfig):
    """ViT-VQGAN (arXiv 2110.04627): raster patches, plain transformer, one codebook."""

    kind: str = "vit-vqgan"
    transform: str = "identity"
    scales: int = 1
    patch: int = 8
    specialised: bool = False


@dataclass
class NestedConfig(TokenizerConfig):
    """Nested spectral tokens."""

    kind: str = "nested"
    num_tokens: int = 64
    """N: tokens of an image."""
    patch: int = 8
    """Side of the patches that the encoder sees and the decoder's mask tokens make."""
    frequency_map: str = "information"
    """How wide the square of frequencies is that the first i of N tokens make, of R. Measured from the images:
    information, every token the same share of the bits that a code of this rate would spend (reverse water-filling of
    Gaussian coefficients), or energy, the same share of their energy. By law: power, R (i/N)^e, or mirrored,
    R - (R - 1) ((N - i)/(N - 1))^e."""
    frequency_exponent: float = 1.5
    """e. Above 1 power spends more tokens on low frequencies, as the paper wants it, and mirrored fewer."""
    widths: list[int] = field(default_factory=list)
    """The N widths themselves in place of a law: never falling, the last one the image's longer side."""
    prefix_law: str = "uniform"
    """Law of the training prefix: uniform over 1 … N, or log_uniform, which favours short ones."""
    full_share: float = 0.5
    """Share of training images that keep all tokens; 0 is plain nested dropout, which starves the last tokens."""
    ring_summaries: int = 8
    """Linear summaries of its own share of frequencies that a token is told of, and by which it adds to them in the
    decoded image; 0, as in the paper: it learns all through attention."""
    project: bool = True
    """Cut what the decoder makes to the prefix's frequencies: never farther from what it should be."""
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=TransformerConfig)
    quantizer: QuantizerConfig = field(default_factory=CosineVQConfig)
    head: HeadConfig = field(default_factory=HeadConfig)


@dataclass
class TokenizerTrainingConfig:
    """Training of stage 1. Steps are generator steps."""

    max_steps: int = 10_000
    """Generator updates."""
    batch_size_per_device: int = 64
    """Images in one forward pass of one process."""
    accumulate_batches: int = 1
    """Forward passes per update."""
    precision: str = "auto"
    """auto (bf16 where the hardware multiplies it), 32 or bf16; transforms, quantiser, perceptual distance and
    adversarial loss stay in float32. A run goes on in what it began with."""
    optimizer: str = "adamw"
    """Of the generator: adamw, or muon, which is Muon for the matrices in the transformers' layers and AdamW for all
    else; the discriminator has AdamW."""
    learning_rate: float = 4e-4
    """Peak, generator."""
    matrix_learning_rate: float = 2e-2
    """Peak, of the matrices that Muon updates; learning_rate is that of all else."""
    discriminator_learning_rate: float = 2e-4
    """Peak, discriminator."""
    warmup_steps: int = 100
    """Linear rise of all rates."""
    final_learning_rate_share: float = 0.05
    """Cosine decay ends at this share of the peak."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Adam's averaging factors, generator; the discriminator uses (0.5, 0.9)."""
    weight_decay: float = 1e-4
    """Decoupled, on matrices only."""
    gradient_clip_norm: float = 1.0
    """Clip of each network's gradient norm."""
    ema_decay: float = 0.999
    """Averaging of the exported weights, with timm's warm-up."""
    pixel_weight: float = 1.0
    """Weight of the mean squared error of pixels in [-1, 1]."""
    perceptual: str = "lite0"
    """Backbone of the perceptual distance: lite0 (EfficientNet-Lite0, offline), lpips-vgg (torchmetrics), or none."""
    perceptual_weight: float = 0.02
    """Lite0's distance is about five times LPIPS, for which the paper takes 0.1."""
    adversarial_weight: float = 0.1
    """Weight of the generator's adversarial term after the ramp; 0 trains without a discriminator."""
    adversarial_loss: str = "hinge"
    """hinge, or logistic: StyleGAN's non-saturating pair."""
    adversarial_start: int = 2_000
    """Step at which the adversarial term begins to reach the generator; the discriminator trains from step 0."""
    adversarial_ramp_steps: int = 1_000
    """Steps over which its weight rises linearly from 0."""
    commitment_weight: float = 0.25
    """Pull of the encoder to its code (all quantisers but FSQ)."""
    codebook_weight: float = 1.0
    """Pull of the code to the encoder (quantisers with a codebook)."""
    entropy_weight: float = 0.05
    """Weight of the entropy of each token's signs less that of their mean, in nats (lfq and bsq); the mean is over one
    forward pass of all processes."""
    head_weight: float = 1.0
    """Weight of the head's mean squared error; no gradient of it reaches the tokens."""
    oversampling: int = 1
    """Training images are read at this multiple of images.size and reduced; a head learns from the large ones."""
    start_from: str | None = None
    """A finished tokenizer whose weights are taken and stay as they are: its tokens remain, a head is trained."""
    discriminator: str = "patch"
    """patch: a PatchGAN, one logit a patch; style: StyleGAN2's, one logit an image (sides of 8, 16, 32, 64, ...)."""
    discriminator_width: int = 64
    """Channels of the discriminator's first layer; they double at every halving, up to eight times as many."""
    discriminator_layers: int = 3
    """Strided layers of the PatchGAN; 3 sees 70 pixels. Style halves down to 4 pixels, whatever stands here."""
    r1_weight: float = 0.0
    """Gamma of R1: gamma/2 times the squared gradient of the summed logits of a real image; 0 leaves it out."""
    r1_every: int = 16
    """Generator updates between two applications of R1, each of which counts that many times."""
    lecam_weight: float = 0.0
    """Weight of LeCam, which holds the logits near their running means of the last 100 updates; 0 leaves it out."""
    fit_images: int = 2048
    """Training images from which coefficient statistics are measured before the first step."""
    log_every: int = 50
    """Steps between log entries."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints."""
    validate_every: int = 1_000
    """Steps between validations."""
    validation_images: int = 512
    """Held-out images in one validation."""
