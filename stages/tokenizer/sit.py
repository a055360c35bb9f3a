"""SIT, the Spectral Image Tokenizer (Esteves, Suhail, Makadia; arXiv 2412.09607), with ViT-VQGAN as a special case.

image → wavelets → one sequence of S scales with equally many tokens → transformer → two codebooks → transformer →
inverse wavelets → image. Notes:

- Every scale has the same grid: the patch side doubles from scale to scale (except for approximation and first
  details). A detail token contains all three orientations of its place.
- A scale-causal encoder gives exact prefixes: the tokens of a small image are the first scales of the large one. A
  scale-causal decoder can decode prefixes. ``attention`` is sit, sit-sc (both), sit-scd (decoder) or sit-sce (encoder).
- The wavelets use averaging scale, so the approximation is the downsampled image. Each scale is divided by its standard
  deviation, which ``fit`` measures from data (the paper does not describe its normalization).
- ``transform: identity`` with one scale is ViT-VQGAN, so the baseline of every comparison runs the same code.
- Wavelets longer than Haar reach into neighboring patches. With ``overlap`` a token reads and writes a margin around
  its patch, and overlapping outputs of neighbors are blended. (The paper found longer wavelets worse because of "more
  padding and leakage" and did not pursue them.)
- With ``planes: ycbcr`` each scale is split into luma and chroma. Chroma has a quarter of the tokens, patches twice as
  large, and its own codebooks. In the encoder luma never attends to chroma, for any ``attention``. So a gray image has
  the luma tokens of the color image, as colorization needs (luma in image files is rounded to 8 bits, so a few tokens
  differ). Chroma attends to luma of its own scale and, in a scale-causal encoder, to no later one. The decoder is
  dense, or causal in the order Y0 C0 Y1 C1 …, so a prefix may end between luma and chroma; it decodes with the chroma
  it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.errors import InputError
from data.layout import Scale, TokenLayout, Tokens
from stages.contract import PrefixUnsupported, TokenizerOutput
from stages.factory import build_head, build_quantizer
from stages.spectral.colour import join_planes, split_planes
from stages.spectral.patches import from_windows, to_windows
from stages.spectral.wavelets import WAVELETS, dwt, idwt, is_wavelet
from stages.tokenizer.config import PLANES, SITConfig
from stages.tokenizer.config import ViTVQGANConfig as ViTVQGANConfig
from stages.tokenizer.heads import HeadedTokenizer
from stages.tokenizer.transformer import Transformer, blind_to_chroma, scale_causal

CAUSAL = {  # attention: (encoder, decoder)
    "sit": (False, False),
    "sit-sc": (True, True),
    "sit-scd": (False, True),
    "sit-sce": (True, False),
}


@dataclass(frozen=True)
class Part:
    """Content of the tokens of one scale: some planes of one level of coefficients, cut into patches."""

    level: int
    """0 for the approximation, then details from coarse to fine."""
    planes: str
    """all, luma or chroma."""
    channels: slice
    grid: tuple[int, int]
    patch: int
    margin: int

    @property
    def width(self) -> int:
        """Number of coefficients of a token."""
        orientations = 3 if self.level else 1
        channels = self.channels.stop - self.channels.start
        return int(channels * orientations * (self.patch + 2 * self.margin) ** 2)

    def cut(self, bands: list[Tensor]) -> Tensor:
        """Cut the patches [B, N, width] of this scale from all bands."""
        band = bands[self.level][..., self.channels, :, :]
        return to_windows(band.flatten(1, 2) if self.level else band, self.patch, self.margin)

    def paste(self, patches: Tensor) -> Tensor:
        """The inverse of ``cut``: the channels of this scale in its band, [B, C, h, w] or [B, 3, C, h, w]."""
        band = from_windows(patches, self.patch, self.margin, self.grid)
        return band.unflatten(1, (3, -1)) if self.level else band


def parts_of(config: SITConfig, image_size: tuple[int, int], channels: int) -> list[Part]:
    """The scales of a config, in order."""
    reduction = 2 ** (config.scales - 1)
    rows, columns = (side // reduction // config.patch for side in image_size)
    parts = []
    for level in range(config.scales):
        factor = 2 ** max(0, level - 1)
        patch_and_margin = config.patch * factor, config.overlap * factor
        if config.planes == "all":
            parts.append(Part(level, "all", slice(0, channels), (rows, columns), *patch_and_margin))
        else:
            parts.append(Part(level, "luma", slice(0, 1), (rows, columns), *patch_and_margin))
            doubled = 2 * patch_and_margin[0], 2 * patch_and_margin[1]
            parts.append(Part(level, "chroma", slice(1, 3), (rows // 2, columns // 2), *doubled))
    return parts


class SIT(HeadedTokenizer):
    """Spectral Image Tokenizer. Raises ValueError for an invalid config or image size (see ``check_config``)."""

    scale_mean: Tensor
    scale_std: Tensor

    def __init__(self, config: SITConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        check_config(config, image_size, channels)
        self.config = config
        self.channels = channels
        self.levels = config.scales - 1
        self.parts = parts_of(config, image_size, channels)
        self.grid = self.parts[0].grid
        causal_encoder, causal_decoder = CAUSAL[config.attention]

        # one codebook for approximation and details, each also for luma and chroma if separate, in order of first use
        kinds = list(dict.fromkeys((min(part.level, 1), part.planes) for part in self.parts))
        self.quantizers = nn.ModuleList(
            [build_quantizer(config.quantizer, config.encoder.width, config.decoder.width) for _ in kinds]
        )
        scales = []
        for part in self.parts:
            codebook = kinds.index((min(part.level, 1), part.planes))
            factor = 2 ** (self.levels - part.level)
            first_name = "raster" if config.transform == "identity" else "approximation"
            name = f"detail{part.level}" if part.level else first_name
            scales.append(
                Scale(
                    name=name if part.planes == "all" else f"{name} {part.planes}",
                    length=part.grid[0] * part.grid[1],
                    grid=part.grid,
                    codebook=codebook,
                    fields=self.quantizers[codebook].fields,  # type: ignore[arg-type]
                    image_size=(image_size[0] // factor, image_size[1] // factor),
                    planes=part.planes,
                )
            )
        self.layout = TokenLayout(
            scales=tuple(scales),
            encodes_prefixes=causal_encoder and config.scales > 1,
            decodes_prefixes=causal_decoder and config.scales > 1,
        )
        self.lengths = [scale.length for scale in scales]
        approximation = sum(length for part, length in zip(self.parts, self.lengths, strict=True) if not part.level)
        separate = config.specialised and config.scales > 1
        groups = [approximation, self.layout.length - approximation] if separate else [self.layout.length]
        self.embed = nn.ModuleList([nn.Linear(part.width, config.encoder.width) for part in self.parts])
        equal_groups = [self.layout.length // config.groups] * config.groups
        causal = scale_causal(equal_groups if config.groups > 1 else self.lengths)
        encoder_mask = causal if causal_encoder else None
        if config.planes != "all":
            luma_mask = blind_to_chroma([part.planes for part in self.parts], self.lengths)
            encoder_mask = luma_mask if encoder_mask is None else encoder_mask & luma_mask
        self.encoder = Transformer(config.encoder, groups, encoder_mask)
        self.decoder = Transformer(config.decoder, groups, causal if causal_decoder else None)
        self.heads = nn.ModuleList([nn.Linear(config.decoder.width, part.width) for part in self.parts])
        for part, head in zip(self.parts, self.heads, strict=True):
            nn.init.normal_(head.weight, std=0.02 * (config.detail_head_gain if part.level else 1))  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        place_width, place_side = len(self.parts) * config.decoder.width, config.patch * 2**self.levels
        self.head = build_head(config.head, place_width, place_side, self.grid, channels)
        self.register_buffer("scale_mean", torch.zeros(len(self.parts)))
        self.register_buffer("scale_std", torch.ones(len(self.parts)))

    # ------------------------------------------------------------------ coefficients

    def _transform(self, pixels: Tensor, levels: int) -> list[Tensor]:
        """Bands of pixels [B, C, H, W] with ``levels`` of details, in the planes of this config."""
        planes = pixels if self.config.planes == "all" else split_planes(pixels)
        return dwt(planes, levels, self.config.transform, "averaging") if levels else [planes]

    def _invert(self, bands: list[Tensor]) -> Tensor:
        """The inverse of ``_transform``."""
        planes = idwt(bands, self.config.transform, "averaging") if len(bands) > 1 else bands[0]
        return planes if self.config.planes == "all" else join_planes(planes)

    def analyse(self, pixels: Tensor) -> list[Tensor]:
        """Patches [B, N, width] of each scale up to the size of the image, not normalized.

        Raises ValueError for a size that is no rung.
        """
        size = tuple(pixels.shape[-2:])
        rungs = list(dict.fromkeys(scale.image_size for scale in self.layout.scales))
        if size not in rungs:
            raise InputError(f"an image of {size[0]}x{size[1]}; this tokenizer takes {_sizes(rungs)}")
        levels = rungs.index(size)
        bands = self._transform(pixels, levels)
        return [part.cut(bands) for part in self.parts if part.level <= levels]

    def synthesise(self, patches: list[Tensor]) -> Tensor:
        """The image [B, C, h, w] from the patches of the first scales. Missing chroma is 0."""
        bands: list[Tensor] = []
        for part, cut in zip(self.parts, patches, strict=False):
            band = part.paste(cut)
            if part.planes == "chroma":
                bands[-1] = torch.cat((bands[-1], band), dim=-3)
            else:
                bands.append(band)
        if self.config.planes != "all" and bands[-1].shape[-3] == 1:
            bands[-1] = functional.pad(bands[-1], (0, 0, 0, 0, 0, 2))
        return self._invert(bands)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure the standard deviation of each scale (and the mean of the approximation) from pixels [B, C, H, W]."""
        count = torch.zeros(len(self.parts), dtype=torch.float64)
        total, squares = torch.zeros_like(count), torch.zeros_like(count)
        for pixels, _ in batches:
            for index, part in enumerate(self.analyse(pixels)):
                part = part.cpu().double()
                count[index] += part.numel()
                total[index] += part.sum()
                squares[index] += part.square().sum()
        if count[0] == 0:
            raise InputError("no images to measure coefficient statistics from")
        mean = total / count
        for index, scale in enumerate(self.parts):
            if scale.level:
                mean[index] = 0  # the mean of details is 0 by design; a measured one is noise
        std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
        self.scale_mean.copy_(mean)
        # do not amplify a scale without energy (constant images)
        self.scale_std.copy_(std.clamp_min(1e-3))

    # ------------------------------------------------------------------ encoder and decoder

    def _encode_features(self, pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, enabled=False):
            parts = self.analyse(pixels)
            parts = [(part - self.scale_mean[index]) / self.scale_std[index] for index, part in enumerate(parts)]
        return self.encoder(torch.cat([embed(part) for embed, part in zip(self.embed, parts, strict=False)], dim=1))

    def _decode_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(image [B, C, h, w], features of each place of the grid [B, N, scales · decoder width])."""
        hidden = self._by_scale(self.decoder(features))
        parts = [head(part) for head, part in zip(self.heads, hidden, strict=False)]
        with torch.autocast(features.device.type, enabled=False):
            parts = [part.float() * self.scale_std[index] + self.scale_mean[index] for index, part in enumerate(parts)]
            return self.synthesise(parts), torch.cat([self._spread(part) for part in hidden], dim=-1)

    def _spread(self, hidden: Tensor) -> Tensor:
        """Repeat the features [B, n, D] of a scale on the finest grid: [B, N, D]."""
        if hidden.shape[1] == self.grid[0] * self.grid[1]:
            return hidden
        coarse = hidden.unflatten(1, (self.grid[0] // 2, self.grid[1] // 2))
        return coarse.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)

    def _by_scale(self, x: Tensor) -> list[Tensor]:
        """Split a sequence [B, L, …] into its scales."""
        return list(x.split(self.lengths[: self.layout.num_scales_in(x.shape[1])], dim=1))

    def _by_codebook(self, x: Tensor) -> list[Tensor]:
        """Split a sequence [B, L, …] into the tokens of each codebook."""
        parts: dict[int, list[Tensor]] = {}
        for scale, part in zip(self.layout.scales, self._by_scale(x), strict=False):
            parts.setdefault(scale.codebook, []).append(part)
        return [torch.cat(part, dim=1) for part in parts.values()]

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """The inverse of ``_by_codebook``."""
        rest, sequence = list(parts), []
        for scale in self.layout.scales:
            if scale.codebook < len(rest) and rest[scale.codebook].shape[1]:
                own = rest[scale.codebook]
                sequence.append(own[:, : scale.length])
                rest[scale.codebook] = own[:, scale.length :]
        return torch.cat(sequence, dim=1)

    def forward(self, pixels: Tensor, large: Tensor | None = None) -> TokenizerOutput:
        features = self._encode_features(pixels)
        parts = self._by_codebook(features)
        results = [quantizer(part) for quantizer, part in zip(self.quantizers, parts, strict=False)]
        losses = {
            name: sum(result.losses[name] * part.shape[1] for result, part in zip(results, parts, strict=True))
            / features.shape[1]
            for name in results[0].losses
        }
        reconstruction, places = self._decode_features(self._in_order([result.features for result in results]))
        losses |= self.head.losses(places, reconstruction, pixels if large is None else large)
        return TokenizerOutput(reconstruction, self._in_order([result.ids for result in results]), losses)

    def margins(self, pixels: Tensor) -> Tensor:
        """Distance of each token of pixels [B, C, h, w] from another choice: float32 [B, L], see ``Quantizer.margins``.

        Raises ValueError for a size that is no rung.
        """
        parts = self._by_codebook(self._encode_features(pixels))
        margins = [quantizer.margins(part) for quantizer, part in zip(self.quantizers, parts, strict=False)]  # type: ignore[operator]
        return self._in_order(margins)

    def codes(self, tokens: Tokens) -> Tensor:
        """The code of each token: float32 [B, L, D]."""
        parts = self._by_codebook(tokens.ids)
        codes = [quantizer.codes(part) for quantizer, part in zip(self.quantizers, parts, strict=False)]  # type: ignore[operator]
        return self._in_order(codes)

    def encode(self, pixels: Tensor) -> Tokens:
        if tuple(pixels.shape[-2:]) != self.layout.image_size and not self.layout.encodes_prefixes:
            raise PrefixUnsupported(
                f"an image of {pixels.shape[-2]}x{pixels.shape[-1]} given to a tokenizer of "
                f"{_sizes([self.layout.image_size])} whose encoder ({self.config.attention}) sees all scales at once; "
                "use tokenizer.attention=sit-sce or sit-sc"
            )
        parts = self._by_codebook(self._encode_features(pixels))
        ids = [quantizer.ids(part) for quantizer, part in zip(self.quantizers, parts, strict=False)]  # type: ignore[operator]
        return Tokens.fixed(self._in_order(ids))

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
        pixels, places = self._decode_features(self._in_order(features))
        return pixels.clamp(-1, 1), places

    def reference(self, pixels: Tensor, num_scales: int) -> Tensor:
        """The image downsampled by the low-pass filter of the wavelet to the size of ``num_scales`` scales.

        If these end with luma, the chroma is that of the previous level, without details.
        """
        part = self.parts[num_scales - 1]
        bands = self._transform(pixels, self.levels - part.level)[:1]
        if part.planes != "luma":
            return self._invert(bands)
        luma, chroma = bands[0][:, :1], bands[0][:, 1:]
        smooth_chroma = torch.zeros_like(chroma)
        if part.level:
            coarse, details = dwt(chroma, 1, self.config.transform, "averaging")
            smooth_chroma = idwt([coarse, torch.zeros_like(details)], self.config.transform, "averaging")
        return self._invert([torch.cat((luma, smooth_chroma), dim=1)])


def check_config(config: SITConfig, image_size: tuple[int, int], channels: int) -> None:
    """Raise ValueError for an invalid config or image size; the message says what is allowed."""
    if config.attention not in CAUSAL:
        raise InputError(f"tokenizer.attention={config.attention!r}; allowed: {', '.join(CAUSAL)}")
    if config.transform != "identity" and not is_wavelet(config.transform):
        raise InputError(f"tokenizer.transform={config.transform!r}; allowed: identity, {WAVELETS}")
    if config.transform == "identity" and config.scales != 1:
        raise InputError(f"tokenizer.scales={config.scales}; allowed with transform identity: 1")
    if config.groups != 1 and config.transform != "identity":
        raise InputError(
            f"tokenizer.groups={config.groups} with transform {config.transform}; allowed: 1, its scales are the groups"
        )
    if config.groups != 1 and config.planes != "all":
        raise InputError(
            f"tokenizer.groups={config.groups} with planes {config.planes}; allowed: 1, its scales are the groups"
        )
    if config.groups < 1:
        raise InputError(f"tokenizer.groups={config.groups}; allowed: 1 or more")
    if config.scales < 1 or config.patch < 1:
        raise InputError(f"tokenizer.scales={config.scales}, tokenizer.patch={config.patch}; allowed: 1 or more")
    if not 0 <= config.overlap <= config.patch:
        raise InputError(f"tokenizer.overlap={config.overlap}; allowed: 0 to tokenizer.patch={config.patch}")
    if config.planes not in PLANES:
        raise InputError(f"tokenizer.planes={config.planes!r}; allowed: {', '.join(PLANES)}")
    if config.planes == "ycbcr" and channels != 3:
        raise InputError("tokenizer.planes=ycbcr with images.channels=1: gray images have no chroma; set planes=all")
    # a chroma patch has the size of 2x2 luma patches
    unit = 2 ** (config.scales - 1) * config.patch * (1 if config.planes == "all" else 2)
    planes = "" if config.planes == "all" else f" and planes {config.planes}"
    for side in image_size:
        if side % unit:
            nearest = (max(1, side // unit) * unit, (side // unit + 1) * unit)
            raise InputError(
                f"images.size={side}: {config.scales} scales with patch {config.patch}{planes} need a multiple of "
                f"{unit} (nearest: {nearest[0]}, {nearest[1]})"
            )
    if (image_size[0] // unit * (image_size[1] // unit)) % config.groups:
        tokens = f"{image_size[0] // unit}x{image_size[1] // unit}"
        raise InputError(f"tokenizer.groups={config.groups}; allowed: a divisor of the number of tokens, {tokens}")


def _sizes(sizes: list[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sizes)
