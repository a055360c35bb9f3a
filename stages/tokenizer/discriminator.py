"""Adversarial training of stage 1: two discriminators, two pairs of losses, two regularizers.

A discriminator takes one or more batches of images [B, C, H, W] and returns one tensor of logits for each. Batches in
one pass use the same spectral norms, but no statistics are computed across batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from data.errors import InputError
from stages.tokenizer.config import TokenizerTrainingConfig

SMALLEST_SIDE = 4
"""Side at which the style discriminator stops halving."""
STATISTIC_GROUP = 4
"""Maximum number of images in a group for the minibatch standard deviation."""
LECAM_DECAY = 0.99
"""Decay of the running means of logits per update."""


class PatchDiscriminator(nn.Sequential):
    """One logit per overlapping patch (Isola et al. 2017), with spectral norm in every layer (Miyato et al. 2018).

    There is no batch norm, which would mix the samples of a batch and differ between ranks.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        widths = [channels] + [width * min(2**index, 8) for index in range(layers + 1)]
        modules: list[nn.Module] = []
        for index in range(layers + 1):
            stride = 2 if index < layers else 1
            kernel = 4 if index < layers else 3
            convolution = nn.Conv2d(widths[index], widths[index + 1], kernel, stride, padding=1)
            modules += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
        super().__init__(*modules, spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))

    def forward(self, *batches: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, 1, h, w] of each batch of images [B, C, H, W]."""
        return super().forward(torch.cat(batches)).chunk(len(batches))


class StyleDiscriminator(nn.Module):
    """One logit per image: the residual discriminator of StyleGAN2 (Karras et al. 2020), as used in ViT-VQGAN.

    Blocks halve the image until its shorter side is 4. Level i has ``width * min(2**i, 8)`` channels. Every layer has
    spectral norm, so the discriminator stays Lipschitz at any learning rate. The equalized learning rate of the
    original is left out, because spectral norm cancels any scale of a weight.

    Raises InputError if halving cannot reduce ``image_size`` (H, W) to 4.
    """

    def __init__(self, channels: int, width: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        blocks = halvings(image_size)
        widths = [width * min(2**level, 8) for level in range(blocks + 1)]
        self.from_rgb = normalised(nn.Conv2d(channels, width, 1))
        self.blocks = nn.ModuleList(
            HalvingBlock(width_in, width_out) for width_in, width_out in zip(widths, widths[1:], strict=False)
        )
        area = math.prod(side // 2**blocks for side in image_size)
        self.compare = normalised(nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1))
        self.gather = normalised(nn.Linear(widths[-1] * area, widths[-1]))
        self.judge = normalised(nn.Linear(widths[-1], 1))

    def forward(self, *batches: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, 1] of each batch of images [B, C, H, W]."""
        x = activate(self.from_rgb(torch.cat(batches)))
        for block in self.blocks:
            x = block(x)
        x = torch.cat([with_deviation(part) for part in x.chunk(len(batches))])
        x = activate(self.compare(x))
        return self.judge(activate(self.gather(x.flatten(1)))).chunk(len(batches))


class HalvingBlock(nn.Module):
    """Residual block of two convolutions: [B, width_in, H, W] → [B, width_out, H/2, W/2]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.first = normalised(nn.Conv2d(width_in, width_in, 3, padding=1))
        self.second = normalised(nn.Conv2d(width_in, width_out, 3, stride=2))
        self.skip = normalised(nn.Conv2d(width_in, width_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        halved = activate(self.second(blur(activate(self.first(x)), padding=2)))
        return (halved + self.skip(blur(x, padding=1, stride=2))) / math.sqrt(2)


def normalised(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Add spectral norm to a layer and set its bias to 0; otherwise biases would dominate the signal in deep layers."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer)


def activate(x: Tensor) -> Tensor:
    """LeakyReLU with slope 0.2, times sqrt(2) as in StyleGAN2, since normalized weights cannot restore the scale."""
    return functional.leaky_relu(x, 0.2) * math.sqrt(2)


def blur(x: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Filter each channel of [B, C, H, W] with (1, 3, 3, 1) / 8 in both directions, with zero padding."""
    taps = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8
    filters = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return functional.conv2d(x, filters, padding=padding, stride=stride, groups=x.shape[1])


def with_deviation(x: Tensor) -> Tensor:
    """Append the minibatch standard deviation (Karras et al. 2018) as a channel: [B, C, H, W] → [B, C + 1, H, W].

    It is averaged over channels and positions, in groups of consecutive images. The group size is the largest divisor
    of B up to 4; for a prime B above 3 it is 1, and the deviation is constant. The concatenated batches of two ranks
    have the same groups as one batch. One call must contain only real or only generated images, as in the loss of the
    generator; in a mixed group, the deviation would reveal the mixture.
    """
    group = next(size for size in range(STATISTIC_GROUP, 0, -1) if len(x) % size == 0)
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (-1, group))
    deviation = (groups.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    channel = deviation.repeat_interleave(group).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])
    return torch.cat([x, channel.to(x.dtype)], dim=1)


def halvings(image_size: tuple[int, int]) -> int:
    """Number of halvings of (H, W) until the shorter side is 4. Raises InputError if this is not possible."""
    shorter = min(image_size)
    count = (shorter // SMALLEST_SIDE).bit_length() - 1
    if count < 1 or shorter != SMALLEST_SIDE * 2**count or max(image_size) % 2**count:
        raise InputError(
            f"images of {image_size[0]}x{image_size[1]} cannot be halved to {SMALLEST_SIDE} pixels, which "
            "tokenizer_training.discriminator=style needs; allowed: a shorter side of 8, 16, 32, 64, ... and a longer "
            "side that can be halved as often; change images.size, or set tokenizer_training.discriminator=patch"
        )
    return count


def build_discriminator(
    training: TokenizerTrainingConfig, channels: int, image_size: tuple[int, int]
) -> PatchDiscriminator | StyleDiscriminator:
    """Build the discriminator of ``training.discriminator``. Raises InputError for an unsupported image size."""
    if training.discriminator == "style":
        return StyleDiscriminator(channels, training.discriminator_width, image_size)
    return PatchDiscriminator(channels, training.discriminator_width, training.discriminator_layers)


# ---------------------------------------------------------------------- losses: logits of any shape → a scalar


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator from logits of any shape (Lim & Ye 2017)."""
    return 0.5 * (functional.relu(1 - real.float()).mean() + functional.relu(1 + fake.float()).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Hinge loss of the generator."""
    return -fake.float().mean()


def logistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropy of the discriminator, summed over real and fake (Goodfellow et al. 2014)."""
    return functional.softplus(-real.float()).mean() + functional.softplus(fake.float()).mean()


def logistic_generator(fake: Tensor) -> Tensor:
    """Non-saturating logistic loss of the generator (Goodfellow et al. 2014, section 3)."""
    return functional.softplus(-fake.float()).mean()


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hinge": (hinge_discriminator, hinge_generator),
    "logistic": (logistic_discriminator, logistic_generator),
}
"""(discriminator loss, generator loss) by ``tokenizer_training.adversarial_loss``."""


# ---------------------------------------------------------------------- regularizers of the discriminator


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1 without gamma/2 (Mescheder et al. 2018, equation 9): the mean over images [B, C, H, W] of |gradient|^2.

    The gradient is that of the sum of all logits; with patch logits it is larger than that of a single logit.
    ``images`` are real images that require gradients, and ``logits`` their logits in float32. The result is
    differentiable.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


class LeCam(nn.Module):
    """Pulls logits of real images to the running mean of fake logits, and vice versa (Tseng et al. 2021).

    The running means are buffers, so that checkpoints contain them. They start at 0, close to the logits of an
    untrained discriminator.
    """

    real: Tensor
    fake: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Penalty (equation 3, one-sided as in the authors' code) for logits of any shape."""
        real_penalty = functional.relu(real.float() - self.fake).square().mean()
        fake_penalty = functional.relu(self.real - fake.float()).square().mean()
        return real_penalty + fake_penalty

    def update(self, real: Tensor, fake: Tensor) -> None:
        """Move the running means toward the mean logits of one update, which must be equal on all ranks."""
        self.real.lerp_(real, 1 - LECAM_DECAY)
        self.fake.lerp_(fake, 1 - LECAM_DECAY)
