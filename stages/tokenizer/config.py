"""Config sections of stage 1: ``tokenizer`` (one dataclass per kind) and ``tokenizer_training``."""

from __future__ import annotations

from dataclasses import dataclass, field

from stages.tokenizer.parts import CosineVQConfig, HeadConfig, QuantizerConfig, TransformerConfig

PLANES = ("all", "ycbcr")
"""Allowed values of ``tokenizer.planes``."""


@dataclass
class TokenizerConfig:
    """Keys of every tokenizer section."""

    kind: str = "sit"
    """Kind of tokenizer; determines the other keys of this section."""
    path: str = "${run}/tokenizer/tokenizer.safetensors"
    """Exported weights: written by train-tokenizer, read by all later commands."""


@dataclass
class SITConfig(TokenizerConfig):
    """The Spectral Image Tokenizer."""

    kind: str = "sit"
    transform: str = "haar"
    """identity (one scale of plain pixels), or the name of a wavelet in PyWavelets: haar; bior2.2 (LeGall 5/3) and
    bior4.4 (CDF 9/7) with symmetric borders; or an orthogonal wavelet such as db2, sym4 or coif1 with periodic borders.
    A small image is the low-pass band of a large one. Only for Haar this is the mean of 2x2 pixels."""
    scales: int = 4
    """S: one approximation and S - 1 levels of details."""
    patch: int = 2
    """Patch side of the approximation (of the image, for transform identity)."""
    overlap: int = 0
    """Margin in coefficients that a token reads and writes around a patch of the approximation, from 0 to ``patch``.
    For larger patches it grows in proportion. Embedding and head of a scale grow by (1 + 2 overlap / patch) squared."""
    planes: str = "all"
    """all (tokens contain all channels), or ycbcr: separate scales for luma and chroma; chroma has a quarter of the
    tokens."""
    attention: str = "sit"
    """sit (dense), sit-sc (scale-causal encoder and decoder), sit-scd (decoder only), sit-sce (encoder only)."""
    groups: int = 1
    """Consecutive groups of equally many tokens, used as scales in scale-causal attention. This applies such a mask to
    a raster. Only for transform identity, which otherwise has one scale."""
    specialised: bool = True
    """ADTransformer: separate weights for approximation and detail tokens."""
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=TransformerConfig)
    quantizer: QuantizerConfig = field(default_factory=CosineVQConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    detail_head_gain: float = 0.1
    """Factor on the initial weights of the detail heads, so that the first outputs are blurred images."""


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
    """N: tokens per image."""
    patch: int = 8
    """Side of the patches of encoder input and decoder output."""
    frequency_map: str = "information"
    """Width of the square of frequencies decoded from the first i of N tokens; R is the full width. Measured from
    images: information gives every token the same share of the bits of a code of this rate (reverse water-filling of
    Gaussian coefficients), energy the same share of their energy. By formula: power is R (i/N)^e, mirrored is
    R - (R - 1) ((N - i)/(N - 1))^e."""
    frequency_exponent: float = 1.5
    """e. Above 1, power uses more tokens for low frequencies, as in the paper, and mirrored fewer."""
    widths: list[int] = field(default_factory=list)
    """List of the N widths, which replaces frequency_map: never decreasing, the last one equal to the longer side."""
    prefix_law: str = "uniform"
    """Distribution of prefix lengths in training: uniform over 1 … N, or log_uniform, which favors short ones."""
    full_share: float = 0.5
    """Fraction of training images that keep all tokens. 0 is plain nested dropout, which rarely trains the last
    tokens."""
    ring_summaries: int = 8
    """Linear summaries of its frequencies that each token receives, and by which it adds to them in the decoded image.
    0, as in the paper, leaves everything to attention."""
    project: bool = True
    """Remove frequencies outside the prefix from the decoded image. This never increases the distance to the target."""
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
    """auto (bf16 if the hardware supports it natively), 32 or bf16. Transforms, quantizer, perceptual distance and
    adversarial loss stay in float32. A resumed run keeps its precision."""
    optimizer: str = "adamw"
    """Optimizer of the generator: adamw, or muon, which uses Muon for the matrices in transformer layers and AdamW for
    the rest. The discriminator always uses AdamW."""
    learning_rate: float = 4e-4
    """Peak rate of the generator."""
    matrix_learning_rate: float = 1e-2
    """Peak rate of the matrices updated by Muon; all other parameters use learning_rate."""
    discriminator_learning_rate: float = 2e-4
    """Peak rate of the discriminator."""
    warmup_steps: int = 100
    """Steps of linear warm-up for all rates."""
    final_learning_rate_share: float = 0.05
    """Cosine decay ends at this fraction of the peak."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Adam betas of the generator; the discriminator uses (0.5, 0.9)."""
    weight_decay: float = 1e-4
    """Decoupled, on matrices only."""
    gradient_clip_norm: float = 1.0
    """Maximum gradient norm of each network."""
    ema_decay: float = 0.999
    """Decay of the moving average of the exported weights, with timm's warm-up."""
    pixel_weight: float = 1.0
    """Weight of the mean squared error of pixels in [-1, 1]."""
    perceptual: str = "lite0"
    """Backbone of the perceptual distance: lite0 (EfficientNet-Lite0, offline), lpips-vgg (torchmetrics), or none."""
    perceptual_weight: float = 0.02
    """Weight of the perceptual distance. Lite0's distance is about five times LPIPS, for which the paper uses 0.1."""
    adversarial_weight: float = 0.1
    """Weight of the adversarial loss of the generator after the ramp; 0 trains without a discriminator."""
    adversarial_loss: str = "hinge"
    """hinge, or logistic: the non-saturating loss of StyleGAN."""
    adversarial_start: int = 2_000
    """Step from which the generator gets the adversarial loss; the discriminator trains from step 0."""
    adversarial_ramp_steps: int = 1_000
    """Steps over which its weight rises linearly from 0."""
    commitment_weight: float = 0.25
    """Weight of the loss that pulls the encoder to its code (all quantizers except FSQ)."""
    codebook_weight: float = 1.0
    """Weight of the loss that pulls the code to the encoder (quantizers with a codebook)."""
    entropy_weight: float = 0.05
    """Weight of the entropy of each token's signs minus the entropy of their mean, in nats (lfq and bsq). The mean is
    over one forward pass of all processes."""
    head_weight: float = 1.0
    """Weight of the mean squared error of the head. Its gradient does not reach the tokens."""
    oversampling: int = 1
    """Training images are read at this multiple of images.size and downsampled; a head is trained on the large ones."""
    start_from: str | None = None
    """A finished tokenizer whose weights are copied and frozen. Its tokens stay the same; only a head is trained."""
    discriminator: str = "patch"
    """patch: PatchGAN, one logit per patch; style: StyleGAN2, one logit per image (sides of 8, 16, 32, 64, ...)."""
    discriminator_width: int = 64
    """Channels of the first layer of the discriminator; they double at every halving, up to a factor of eight."""
    discriminator_layers: int = 3
    """Strided layers of the PatchGAN; 3 have a receptive field of 54 pixels. Ignored by style, which always halves down
    to 4 pixels."""
    r1_weight: float = 0.0
    """Gamma of R1: gamma/2 times the squared gradient of the summed logits of a real image; 0 disables it."""
    r1_every: int = 16
    """R1 is applied at every r1_every-th generator update, multiplied by r1_every."""
    lecam_weight: float = 0.0
    """Weight of LeCam, which pulls real and fake logits to each other's running mean (over about 100 updates); 0
    disables it."""
    fit_images: int = 2048
    """Training images for measuring coefficient statistics before the first step."""
    log_every: int = 50
    """Steps between log entries."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints."""
    validate_every: int = 1_000
    """Steps between validations."""
    validation_images: int = 512
    """Images in one validation."""
