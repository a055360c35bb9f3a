"""Nested spectral tokens (SpectralAR; Huang et al., arXiv 2506.10962): the first i tokens encode a low-pass image.

image patches and N learned queries → transformer → one codebook → transformer over mask tokens and the first i tokens →
the image, restricted to the w_i lowest frequencies of each axis. Notes:

- Encoder queries attend to all patches and to earlier queries. In the paper's figure patches also attend to queries.
  Then later queries would influence earlier ones through the patches, so here patches attend only to patches.
- The decoder is causal: a token attends to earlier tokens, a mask token to all mask tokens and all tokens of the
  prefix.
- Training draws a prefix for every image (``prefix_law``). Plain nested dropout rarely trains the last tokens, so
  ``full_share`` of the images keep all tokens; the last token is trained on more than that fraction.
- With attention alone, as in the paper, the model learns slowly what each token means. So each token also has a direct
  path to the frequencies that it adds (``ring_summaries``; ``stages/tokenizer/rings.py``).
- The paper does not say how many frequencies a prefix has. Here (``frequency_map``) they are measured, so that every
  token has the same information or energy; or follow a power law or its mirror image; or are a list of widths.
- The layout has N scales of one token each, with one codebook and without a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.layout import Scale, TokenLayout, Tokens
from stages.contract import TokenizerOutput
from stages.factory import build_head, build_quantizer
from stages.spectral.dct import dct_matrix, lowpass
from stages.spectral.patches import from_patches, to_patches
from stages.tokenizer.config import NestedConfig
from stages.tokenizer.heads import HeadedTokenizer
from stages.tokenizer.rings import RingSummaries
from stages.tokenizer.transformer import Transformer, scale_causal

FREQUENCY_MAPS = ("information", "energy", "power", "mirrored")
POSITION_STD = 0.5
PREFIX_LAWS = ("uniform", "log_uniform")


class NestedTokenizer(HeadedTokenizer):
    """Tokenizer with nested spectral tokens. Raises ValueError for an invalid config."""

    widths: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: NestedConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        check_config(config, image_size)
        self.config, self.channels = config, channels
        self.grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        self.num_patches = self.grid[0] * self.grid[1]
        self.quantizer = build_quantizer(config.quantizer, config.encoder.width, config.decoder.width)
        self.layout = TokenLayout(
            scales=tuple(
                Scale(f"token{number}", 1, None, 0, self.quantizer.fields, image_size)
                for number in range(1, config.num_tokens + 1)
            ),
            decodes_prefixes=True,
            report_prefixes=doubling(config.num_tokens),
        )
        width = channels * config.patch**2
        self.embed = nn.Linear(width, config.encoder.width)
        self.queries = nn.Parameter(torch.randn(1, config.num_tokens, config.encoder.width) * 0.02)
        self.masks = nn.Parameter(torch.randn(1, 1, config.decoder.width) * 0.02)
        one_by_one = [1] * config.num_tokens
        length = self.num_patches + config.num_tokens
        # Patches come first and attend only to patches; queries attend to patches and, causally, to queries.
        # These tokens get most information through attention, which with the small initial weights and positions of a
        # ViT is nearly uniform at first. Larger ones gave 23.5 dB instead of 21.9 dB after 200 steps on 32-px crops
        # (one seed, an early version).
        self.encoder = Transformer(
            config.encoder,
            [length],
            scale_causal([self.num_patches, *one_by_one]),
            config.encoder.width**-0.5,
            POSITION_STD,
        )
        mask = torch.ones(length, length, dtype=torch.bool)
        mask[self.num_patches :, : self.num_patches] = False
        mask[self.num_patches :, self.num_patches :] = scale_causal(one_by_one)
        self.decoder = Transformer(config.decoder, [length], mask, config.decoder.width**-0.5, POSITION_STD)
        self.rings: RingSummaries | None = None
        if config.ring_summaries:
            sizes = config.ring_summaries, config.encoder.width, config.decoder.width
            self.rings = RingSummaries(config.num_tokens, *sizes, (channels, *image_size))
        self.to_patches = nn.Linear(config.decoder.width, width)
        nn.init.normal_(self.to_patches.weight, std=0.02)
        nn.init.zeros_(self.to_patches.bias)
        self.head = build_head(config.head, config.decoder.width, config.patch, self.grid, channels)
        self.register_buffer("widths", torch.tensor(widths_of(config, max(image_size))))
        self.register_buffer("pixel_mean", torch.zeros(()))
        self.register_buffer("pixel_std", torch.ones(()))

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure mean and deviation of pixels, deviation of frequencies, and the widths if they are to be measured."""
        size = self.layout.image_size
        rows, columns = (dct_matrix(side) for side in size)
        spectrum = torch.zeros(size, dtype=torch.float64)
        total = squares = count = 0.0
        for pixels, _ in batches:
            pixels = pixels.cpu().double()
            count += pixels.numel()
            total += float(pixels.sum())
            squares += float(pixels.square().sum())
            spectrum += (rows @ pixels @ columns.T).square().sum((0, 1))
        if count == 0:
            raise InputError("no images to measure pixel statistics from")
        mean = total / count
        self.pixel_mean.fill_(mean)
        self.pixel_std.fill_(max(1e-3, math.sqrt(max(0.0, squares / count - mean**2))))  # 0 for constant images
        # no token is needed for the mean brightness of all images
        spectrum[0, 0] -= count * mean**2
        if self.rings is not None:
            deviation = (spectrum.clamp_min(0) / (count / (size[0] * size[1]))).sqrt() / self.pixel_std.double()
            self.rings.deviation.copy_(deviation.clamp_min(1e-3))
        number = self.config.num_tokens
        if self.config.frequency_map in ("information", "energy") and not self.config.widths:
            if self.config.frequency_map == "information":
                bits = number * sum(math.log2(part.vocabulary_size) for part in self.quantizer.fields)
                spectrum = information(spectrum / (count / (size[0] * size[1])), bits / self.channels)
            self.widths.copy_(torch.tensor(equal_shares(spectrum, number)))

    # ------------------------------------------------------------------ encoder and decoder

    def _encode_features(self, pixels: Tensor) -> Tensor:
        """Features [B, N, encoder width] of pixels [B, C, H, W]. Raises ValueError for another image size."""
        size = tuple(pixels.shape[-2:])
        if size != self.layout.image_size:
            height, width = self.layout.image_size
            raise InputError(f"an image of {size[0]}x{size[1]}; this tokenizer takes {height}x{width}")
        with torch.autocast(pixels.device.type, enabled=False):
            normalized = (pixels.float() - self.pixel_mean) / self.pixel_std
            summaries = 0 if self.rings is None else self.rings.analyse(normalized, self.widths)
        embedded = self.embed(to_patches(normalized, self.config.patch))
        queries = (self.queries + summaries).expand(pixels.shape[0], -1, -1).to(embedded.dtype)
        return self.encoder(torch.cat([embedded, queries], dim=1))[:, self.num_patches :]

    def _decode_features(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(images [B, C, H, W], features of each patch [B, N, decoder width]) from the first ``lengths`` int64 [B] of n
        tokens with features [B, n, decoder width]."""
        batch, number = features.shape[:2]  # len() would make the batch size of an exported program a constant
        masks = self.masks.expand(batch, self.num_patches, -1).to(features.dtype)
        valid = torch.arange(number, device=features.device) < lengths[:, None]
        present = torch.cat([valid.new_ones(batch, self.num_patches), valid], dim=1)
        hidden, tokens = self.decoder(torch.cat([masks, features], dim=1), present).split(
            [self.num_patches, number], dim=1
        )
        patches = self.to_patches(hidden)
        with torch.autocast(features.device.type, enabled=False):
            pixels = from_patches(patches.float(), self.config.patch, self.grid)
            if self.rings is not None:
                pixels = pixels + self.rings.synthesise(tokens * valid.unsqueeze(-1), self.widths)
            pixels = pixels * self.pixel_std + self.pixel_mean
            return lowpass(pixels, self.widths[lengths - 1]) if self.config.project else pixels, hidden

    def draw_lengths(self, count: int) -> Tensor:
        """Prefix lengths int64 [count] for training images, by ``prefix_law`` and ``full_share``."""
        number, device = self.config.num_tokens, self.widths.device
        share = torch.rand(count, device=device)
        drawn = share * number if self.config.prefix_law == "uniform" else (number + 1) ** share - 1
        lengths = drawn.long().clamp(max=number - 1) + 1
        return lengths.masked_fill(torch.rand(count, device=device) < self.config.full_share, number)

    def forward(self, pixels: Tensor, large: Tensor | None = None) -> TokenizerOutput:
        result = self.quantizer(self._encode_features(pixels))
        large = pixels if large is None else large
        if not self.training:
            reconstruction, places = self._decode_features(result.features, self._all(len(pixels)))
            return TokenizerOutput(
                reconstruction, result.ids, result.losses | self.head.losses(places, reconstruction, large)
            )
        lengths = self.draw_lengths(len(pixels))
        reconstruction, places = self._decode_features(result.features, lengths)
        with torch.autocast(pixels.device.type, enabled=False):
            widths = self.widths[lengths - 1]
            target = lowpass(pixels, widths)
            # the same frequencies in the larger images; the full width means all their frequencies
            large_target = lowpass(large, widths.masked_fill(widths >= max(pixels.shape[-2:]), max(large.shape[-2:])))
        losses = result.losses | self.head.losses(places, reconstruction, large_target)
        return TokenizerOutput(reconstruction, result.ids, losses, target)

    def _all(self, count: int, number: int | None = None) -> Tensor:
        return torch.full((count,), number or self.config.num_tokens, device=self.widths.device)

    def encode(self, pixels: Tensor) -> Tokens:
        return Tokens.fixed(self.quantizer.ids(self._encode_features(pixels)))

    def codes(self, tokens: Tokens) -> Tensor:
        """The code of each token: float32 [B, L, D]."""
        return self.quantizer.codes(tokens.ids)

    def decode_places(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        number = self.layout.num_scales_in(tokens.ids.shape[1])
        if number == 0:
            raise InputError("no tokens to decode")
        features = self.quantizer.lookup(tokens.ids)
        pixels, places = self._decode_features(features, self._all(tokens.ids.shape[0], number))
        return pixels.clamp(-1, 1), places

    def reference(self, pixels: Tensor, num_scales: int) -> Tensor:
        """The image with only the frequencies of the first ``num_scales`` tokens. Values may exceed [-1, 1]."""
        return lowpass(pixels, self.widths[num_scales - 1].expand(len(pixels)))


def doubling(number: int) -> tuple[int, ...]:
    """1, 2, 4, … below ``number``, and ``number`` itself."""
    return (*(2**power for power in range((number - 1).bit_length())), number)


def widths_of(config: NestedConfig, side: int) -> list[int]:
    """The width of every prefix, 1 … ``side``, never decreasing. Raises ValueError for an invalid list of widths.

    Measured maps start with the widths of power; ``fit`` then replaces them.
    """
    number, exponent = config.num_tokens, config.frequency_exponent
    if config.widths:
        check_widths(config.widths, number, side)
        return list(config.widths)
    if config.frequency_map == "mirrored" and number > 1:
        remaining = [((number - i) / (number - 1)) ** exponent for i in range(1, number + 1)]
        return [round(side - (side - 1) * share) for share in remaining]
    return [max(1, math.ceil(side * (i / number) ** exponent - 1e-9)) for i in range(1, number + 1)]


def information(variances: Tensor, bits: float) -> Tensor:
    """Bits per frequency in a code of ``bits`` for Gaussian coefficients: float64 [H, W] like ``variances``.

    Reverse water-filling (Cover and Thomas, *Elements of Information Theory*, theorem 10.3.3): log2 of the standard
    deviation divided by that of the distortion, which is equal for all frequencies with a larger variance, and 0 for
    the others.
    """
    low, high = 0.0, float(variances.max())
    for _ in range(100):  # bisection for the distortion with this number of bits
        distortion = (low + high) / 2
        spent = (variances / max(distortion, 1e-300)).clamp_min(1).log2() / 2
        low, high = (distortion, high) if float(spent.sum()) > bits else (low, distortion)
    return spent


def equal_shares(amounts: Tensor, number: int) -> list[int]:
    """Widths of the squares in ``amounts`` [H, W] whose sums reach 1/number, 2/number, … of the total."""
    side = max(amounts.shape)
    sums = torch.stack([amounts[:width, :width].sum() for width in range(1, side + 1)]).clamp_min(0)
    targets = torch.arange(1, number + 1, dtype=sums.dtype) / number * sums[-1]
    widths = (torch.searchsorted(sums, targets * (1 - 1e-9)) + 1).clamp(max=side).tolist()
    return [*widths[:-1], side]


def check_widths(widths: Sequence[int], number: int, side: int) -> None:
    """Raise ValueError unless there are ``number`` widths of 1 or more that never decrease and end at ``side``."""
    if len(widths) != number:
        raise InputError(f"tokenizer.widths has {len(widths)} widths for tokenizer.num_tokens={number}; give one each")
    for place, (before, width) in enumerate(zip([1, *widths], widths, strict=False), 1):
        if width < before:
            raise InputError(f"tokenizer.widths falls from {before} to {width} at token {place}; it must never fall")
    if widths[-1] != side:
        raise InputError(f"tokenizer.widths ends at {widths[-1]}; it must end at the full square, {side}")


def check_config(config: NestedConfig, image_size: tuple[int, int]) -> None:
    """Raise ValueError for an invalid config or image size; the message says what is allowed."""
    for key, allowed in (("frequency_map", FREQUENCY_MAPS), ("prefix_law", PREFIX_LAWS)):
        if getattr(config, key) not in allowed:
            raise InputError(f"tokenizer.{key}={getattr(config, key)!r}; allowed: {', '.join(allowed)}")
    if config.num_tokens < 1 or config.patch < 1:
        raise InputError(f"tokenizer.num_tokens={config.num_tokens}, patch={config.patch}; allowed: 1 or more")
    if not 0 < config.frequency_exponent < math.inf:
        raise InputError(f"tokenizer.frequency_exponent={config.frequency_exponent}; allowed: above 0")
    if config.ring_summaries < 0:
        raise InputError(f"tokenizer.ring_summaries={config.ring_summaries}; allowed: 0 or more")
    if not 0 <= config.full_share <= 1:
        raise InputError(f"tokenizer.full_share={config.full_share}; allowed: 0 to 1")
    for side in image_size:
        if side % config.patch:
            raise InputError(f"images.size={side}: patches of {config.patch} need a multiple of {config.patch}")
