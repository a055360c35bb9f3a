"""SIT, the Spectral Image Tokenizer (Esteves, Suhail, Makadia; arXiv 2412.09607), and ViT-VQGAN as its special case.

image → Haar wavelets → one sequence of S scales with the same number of tokens → transformer → two codebooks →
transformer → inverse wavelets → image. What is notable here:

- every scale has the same grid: patches double their side from scale to scale, and a detail token holds all three
  orientations of its place;
- scale-causal attention on the encoder gives exact prefixes (a small image's tokens are the first scales of the large
  one), on the decoder it decodes them: ``attention`` is sit, sit-sc (both), sit-scd (decoder) or sit-sce (encoder);
- the wavelets are in averaging scale, so the approximation is the reduced image itself, and each scale is divided by
  its standard deviation, measured from data by ``fit`` (the paper does not say how it normalises);
- ``transform: identity`` with one scale is ViT-VQGAN: the baseline of every comparison runs the same code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.layout import Scale, TokenLayout, Tokens
from stages.contract import PrefixUnsupported, TokenizerOutput
from stages.factory import build_head, build_quantizer
from stages.spectral.haar import haar_dwt, haar_idwt
from stages.spectral.patches import from_patches, to_patches
from stages.tokenizer.config import TokenizerConfig
from stages.tokenizer.heads import HeadConfig, HeadedTokenizer
from stages.tokenizer.quantizers import FSQConfig, QuantizerConfig
from stages.tokenizer.transformer import Transformer, TransformerConfig, scale_causal

CAUSAL = {  # attention: (encoder, decoder)
    "sit": (False, False),
    "sit-sc": (True, True),
    "sit-scd": (False, True),
    "sit-sce": (True, False),
}


@dataclass
class SITConfig(TokenizerConfig):
    """The Spectral Image Tokenizer."""

    kind: str = "sit"
    transform: str = "haar"
    """haar, or identity (one scale, pixels as they are)."""
    scales: int = 4
    """S: one approximation and S - 1 levels of details."""
    patch: int = 2
    """Patch side of the approximation (of the image, with transform identity)."""
    attention: str = "sit"
    """sit (dense), sit-sc (scale-causal encoder and decoder), sit-scd (decoder only), sit-sce (encoder only)."""
    groups: int = 1
    """Consecutive groups of equally many tokens that stand in place of scales in scale-causal attention: what such a
    mask does to a raster. Only with transform identity, where the one scale is one group otherwise."""
    specialised: bool = True
    """ADTransformer: separate weights for approximation and detail tokens."""
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=TransformerConfig)
    quantizer: QuantizerConfig = field(default_factory=FSQConfig)
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


class SIT(HeadedTokenizer):
    """Spectral Image Tokenizer. Raises ValueError for a side that scales and patch do not divide."""

    scale_mean: Tensor
    scale_std: Tensor

    def __init__(self, config: SITConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        check_config(config, image_size)
        self.config = config
        self.channels = channels
        self.levels = config.scales - 1
        rows, columns = (side // 2**self.levels // config.patch for side in image_size)
        self.patches = [config.patch] + [config.patch * 2**level for level in range(self.levels)]
        self.grid = (rows, columns)
        tokens = rows * columns
        causal_encoder, causal_decoder = CAUSAL[config.attention]

        num_codebooks = min(config.scales, 2)
        self.quantizers = nn.ModuleList(
            [
                build_quantizer(config.quantizer, config.encoder.width, config.decoder.width)
                for _ in range(num_codebooks)
            ]
        )
        self.layout = TokenLayout(
            scales=tuple(
                Scale(
                    name="approximation"
                    if index == 0 and config.transform == "haar"
                    else f"detail{index}"
                    if index
                    else "raster",
                    length=tokens,
                    grid=self.grid,
                    codebook=min(index, 1),
                    fields=self.quantizers[min(index, 1)].fields,  # type: ignore[arg-type]
                    image_size=(
                        image_size[0] // 2 ** (self.levels - index),
                        image_size[1] // 2 ** (self.levels - index),
                    ),
                )
                for index in range(config.scales)
            ),
            encodes_prefixes=causal_encoder and config.scales > 1,
            decodes_prefixes=causal_decoder and config.scales > 1,
        )
        widths = [channels * (1 if index == 0 else 3) * patch * patch for index, patch in enumerate(self.patches)]
        scale_lengths = [tokens] * config.scales
        separate = config.specialised and config.scales > 1
        groups = [tokens, tokens * self.levels] if separate else [tokens * config.scales]
        self.embed = nn.ModuleList([nn.Linear(width, config.encoder.width) for width in widths])
        mask = scale_causal([tokens // config.groups] * config.groups if config.groups > 1 else scale_lengths)
        self.encoder = Transformer(config.encoder, groups, mask if causal_encoder else None)
        self.decoder = Transformer(config.decoder, groups, mask if causal_decoder else None)
        self.heads = nn.ModuleList([nn.Linear(config.decoder.width, width) for width in widths])
        for index, head in enumerate(self.heads):
            nn.init.normal_(head.weight, std=0.02 * (1 if index == 0 else config.detail_head_gain))  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        place = config.scales * config.decoder.width, config.patch * 2**self.levels
        self.head = build_head(config.head, *place, self.grid, channels)
        self.register_buffer("scale_mean", torch.zeros(config.scales))
        self.register_buffer("scale_std", torch.ones(config.scales))

    # ------------------------------------------------------------------ coefficients

    def analyse(self, pixels: Tensor) -> list[Tensor]:
        """Patches [B, N, width] of each scale that the image's size holds, not yet normalised."""
        size = tuple(pixels.shape[-2:])
        rungs = [scale.image_size for scale in self.layout.scales]
        if size not in rungs:
            raise InputError(f"an image of {size[0]}x{size[1]}; this tokenizer takes {_sizes(rungs)}")
        bands = haar_dwt(pixels, rungs.index(size), "averaging")
        return [
            to_patches(band if index == 0 else band.flatten(1, 2), patch)
            for index, (band, patch) in enumerate(zip(bands, self.patches, strict=False))
        ]

    def synthesise(self, patches: list[Tensor]) -> Tensor:
        """The image [B, C, h, w] of the patches of the first scales."""
        bands = [from_patches(part, patch, self.grid) for part, patch in zip(patches, self.patches, strict=False)]
        return haar_idwt([bands[0], *(band.unflatten(1, (3, self.channels)) for band in bands[1:])], "averaging")

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure each scale's standard deviation (and the approximation's mean) over pixels [B, C, H, W]."""
        count = torch.zeros(len(self.patches), dtype=torch.float64)
        total, squares = torch.zeros_like(count), torch.zeros_like(count)
        for pixels, _ in batches:
            for index, part in enumerate(self.analyse(pixels)):
                part = part.double().cpu()
                count[index] += part.numel()
                total[index] += part.sum()
                squares[index] += part.square().sum()
        if count[0] == 0:
            raise InputError("no images to measure coefficient statistics from")
        mean = total / count
        mean[1:] = 0  # details are centred by nature; what is measured is chance
        std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
        self.scale_mean.copy_(mean)
        # a scale without any energy (constant images) must not be blown up
        self.scale_std.copy_(std.clamp_min(1e-3))

    # ------------------------------------------------------------------ the four arrows

    def _encode_features(self, pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, enabled=False):
            parts = self.analyse(pixels)
            parts = [(part - self.scale_mean[index]) / self.scale_std[index] for index, part in enumerate(parts)]
        return self.encoder(torch.cat([embed(part) for embed, part in zip(self.embed, parts, strict=False)], dim=1))

    def _decode_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(image [B, C, h, w], what is known of each place of the grid [B, N, scales · decoder width])."""
        hidden = self.decoder(features).split(self.grid[0] * self.grid[1], dim=1)
        parts = [head(part) for head, part in zip(self.heads, hidden, strict=False)]
        with torch.autocast(features.device.type, enabled=False):
            parts = [part.float() * self.scale_std[index] + self.scale_mean[index] for index, part in enumerate(parts)]
            return self.synthesise(parts), torch.cat(hidden, dim=-1)

    def _by_codebook(self, x: Tensor) -> list[Tensor]:
        """The sequence cut where the codebook changes."""
        tokens = self.grid[0] * self.grid[1]
        return [x[:, :tokens], x[:, tokens:]] if x.shape[1] > tokens else [x]

    def forward(self, pixels: Tensor, large: Tensor | None = None) -> TokenizerOutput:
        features = self._encode_features(pixels)
        parts = self._by_codebook(features)
        results = [quantizer(part) for quantizer, part in zip(self.quantizers, parts, strict=False)]
        losses = {
            name: sum(result.losses[name] * part.shape[1] for result, part in zip(results, parts, strict=True))
            / features.shape[1]
            for name in results[0].losses
        }
        reconstruction, places = self._decode_features(torch.cat([result.features for result in results], dim=1))
        losses |= self.head.losses(places, reconstruction, pixels if large is None else large)
        return TokenizerOutput(reconstruction, torch.cat([result.ids for result in results], dim=1), losses)

    def margins(self, pixels: Tensor) -> Tensor:
        """How far each token of pixels [B, C, h, w] is from another choice: float32 [B, L], see ``Quantizer.margins``.

        Raises ValueError for a side that is no rung.
        """
        parts = self._by_codebook(self._encode_features(pixels))
        margins = [quantizer.margins(part) for quantizer, part in zip(self.quantizers, parts, strict=False)]  # type: ignore[operator]
        return torch.cat(margins, dim=1)

    def codes(self, tokens: Tokens) -> Tensor:
        """The code of each token: float32 [B, L, D]."""
        parts = self._by_codebook(tokens.ids)
        codes = [quantizer.codes(part) for quantizer, part in zip(self.quantizers, parts, strict=False)]  # type: ignore[operator]
        return torch.cat(codes, dim=1)

    def encode(self, pixels: Tensor) -> Tokens:
        if tuple(pixels.shape[-2:]) != self.layout.image_size and not self.layout.encodes_prefixes:
            raise PrefixUnsupported(
                f"an image of {pixels.shape[-2]}x{pixels.shape[-1]} given to a tokenizer of "
                f"{_sizes([self.layout.image_size])} whose encoder ({self.config.attention}) sees all scales at once; "
                "use tokenizer.attention=sit-sce or sit-sc"
            )
        parts = self._by_codebook(self._encode_features(pixels))
        ids = [quantizer.ids(part) for quantizer, part in zip(self.quantizers, parts, strict=False)]  # type: ignore[operator]
        return Tokens.fixed(torch.cat(ids, dim=1))

    def decode_places(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        num_scales = self.layout.num_scales_in(tokens.ids.shape[1])
        if num_scales == 0:
            raise InputError("no tokens to decode")
        if num_scales < len(self.layout.scales) and not self.layout.decodes_prefixes:
            raise PrefixUnsupported(
                f"{num_scales} of {len(self.layout.scales)} scales given to a decoder ({self.config.attention}) that "
                "needs all of them; use tokenizer.attention=sit-scd or sit-sc"
            )
        parts = self._by_codebook(tokens.ids)
        features = [quantizer.lookup(part) for quantizer, part in zip(self.quantizers, parts, strict=False)]  # type: ignore[operator]
        pixels, places = self._decode_features(torch.cat(features, dim=1))
        return pixels.clamp(-1, 1), places

    def reference(self, pixels: Tensor, num_scales: int) -> Tensor:
        """The image reduced by averaging to the size of ``num_scales`` scales."""
        return haar_dwt(pixels, len(self.layout.scales) - num_scales, "averaging")[0]


def check_config(config: SITConfig, image_size: tuple[int, int]) -> None:
    """Raise ValueError for a config that has no geometry, naming what is allowed."""
    if config.attention not in CAUSAL:
        raise InputError(f"tokenizer.attention={config.attention!r}; allowed: {', '.join(CAUSAL)}")
    if config.transform not in ("haar", "identity"):
        raise InputError(f"tokenizer.transform={config.transform!r}; allowed: haar, identity")
    if config.transform == "identity" and config.scales != 1:
        raise InputError(f"tokenizer.scales={config.scales}; transform identity has 1")
    if config.groups != 1 and config.transform != "identity":
        raise InputError(
            f"tokenizer.groups={config.groups} with transform {config.transform}: its scales are the groups"
        )
    if config.groups < 1:
        raise InputError(f"tokenizer.groups={config.groups}; allowed: 1 or more")
    if config.scales < 1 or config.patch < 1:
        raise InputError(f"tokenizer.scales={config.scales}, tokenizer.patch={config.patch}; allowed: 1 or more")
    unit = 2 ** (config.scales - 1) * config.patch
    for side in image_size:
        if side % unit:
            near = (max(1, side // unit) * unit, (side // unit + 1) * unit)
            raise InputError(
                f"images.size={side}: {config.scales} scales with patch {config.patch} need a multiple of {unit} "
                f"(nearest: {near[0]}, {near[1]})"
            )
    if (image_size[0] // unit * (image_size[1] // unit)) % config.groups:
        tokens = f"{image_size[0] // unit}x{image_size[1] // unit}"
        raise InputError(f"tokenizer.groups={config.groups}: {tokens} tokens cannot be cut into as many equal groups")


def _sizes(sizes: list[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sizes)
