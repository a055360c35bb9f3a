"""The adversary of stage 1: two discriminators, two pairs of losses, two regularisers of the discriminator.

A discriminator takes one batch of images or several at once, each [B, C, H, W], and gives as many tensors of logits.
Several in one pass see the same spectral norms; no statistic is ever taken over more than one of them.
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
"""Where the style discriminator stops halving."""
STATISTIC_GROUP = 4
"""Images that the minibatch standard deviation compares, at most."""
LECAM_DECAY = 0.99
"""Share of a running mean of logits that one update keeps."""


class PatchDiscriminator(nn.Sequential):
    """One logit for each overlapping patch (Isola et al. 2017), every layer spectrally normalised (Miyato et al. 2018).

    No batch norm: it ties the samples of a batch together and differs between ranks.
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
    """One logit for each image: StyleGAN2's residual discriminator (Karras et al. 2020), the one of ViT-VQGAN.

    Blocks halve the image until its shorter side is 4; level i has ``width * min(2**i, 8)`` channels. Every layer is
    spectrally normalised, so that the discriminator stays Lipschitz at any learning rate; the equalised learning rate
    of the original has no place beside that, for the norm undoes every scale of a weight.

    Raises InputError for an ``image_size`` (H, W) that no halving brings to 4.
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
    """Two convolutions beside a skip connection: [B, width_in, H, W] → [B, width_out, H/2, W/2]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.first = normalised(nn.Conv2d(width_in, width_in, 3, padding=1))
        self.second = normalised(nn.Conv2d(width_in, width_out, 3, stride=2))
        self.skip = normalised(nn.Conv2d(width_in, width_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        halved = activate(self.second(blur(activate(self.first(x)), padding=2)))
        return (halved + self.skip(blur(x, padding=1, stride=2))) / math.sqrt(2)


def normalised(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """The layer with spectral norm; its bias starts at 0, or biases would drown what many layers leave of an image."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer)


def activate(x: Tensor) -> Tensor:
    """LeakyReLU with slope 0.2, times sqrt(2) as in StyleGAN2: no weight may grow to make up for what it takes."""
    return functional.leaky_relu(x, 0.2) * math.sqrt(2)


def blur(x: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Each channel of [B, C, H, W] filtered with (1, 3, 3, 1) / 8 in both directions, with zeros beyond the edge."""
    taps = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8
    filters = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return functional.conv2d(x, filters, padding=padding, stride=stride, groups=x.shape[1])


def with_deviation(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, C + 1, H, W]: the last channel says how much neighbours in the batch differ.

    The minibatch standard deviation (Karras et al. 2018), averaged over channels and places, of groups of at most 4
    images: the largest number up to 4 that divides B, so that a prime B above 3 has nothing to compare. Groups are runs
    of neighbours: the batches of two ranks, laid side by side, have the groups of one batch. One call must hold only
    real or only generated images, as at the generator's own pass; in a group of both, each would betray the other.
    """
    group = next(size for size in range(STATISTIC_GROUP, 0, -1) if len(x) % size == 0)
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (-1, group))
    deviation = (groups.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    channel = deviation.repeat_interleave(group).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])
    return torch.cat([x, channel.to(x.dtype)], dim=1)


def halvings(image_size: tuple[int, int]) -> int:
    """How often both sides (H, W) can be halved until the shorter one is 4. Raises InputError where that is never."""
    shorter = min(image_size)
    count = (shorter // SMALLEST_SIDE).bit_length() - 1
    if count < 1 or shorter != SMALLEST_SIDE * 2**count or max(image_size) % 2**count:
        raise InputError(
            f"images of {image_size[0]}x{image_size[1]} cannot be halved to {SMALLEST_SIDE} pixels, which "
            "tokenizer_training.discriminator=style needs; allowed: a shorter side of 8, 16, 32, 64, ... and a longer "
            "one that halves as often; change images.size, or set tokenizer_training.discriminator=patch"
        )
    return count


def build_discriminator(
    training: TokenizerTrainingConfig, channels: int, image_size: tuple[int, int]
) -> PatchDiscriminator | StyleDiscriminator:
    """The one that ``training.discriminator`` names. Raises InputError for a size that it cannot take."""
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
    """Cross-entropy of the discriminator's verdicts, real and fake added up (Goodfellow et al. 2014)."""
    return functional.softplus(-real.float()).mean() + functional.softplus(fake.float()).mean()


def logistic_generator(fake: Tensor) -> Tensor:
    """Non-saturating logistic loss of the generator (Goodfellow et al. 2014, section 3)."""
    return functional.softplus(-fake.float()).mean()


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hinge": (hinge_discriminator, hinge_generator),
    "logistic": (logistic_discriminator, logistic_generator),
}
"""(the discriminator's, the generator's) by ``tokenizer_training.adversarial_loss``."""


# ---------------------------------------------------------------------- regularisers of the discriminator


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1 without gamma/2 (Mescheder et al. 2018, equation 9): the mean over images [B, C, H, W] of |gradient|^2.

    The gradient is that of the sum of all logits, with patches larger than that of one logit. ``images`` are real, need
    gradients, and gave ``logits`` in float32; the result can be differentiated.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


class LeCam(nn.Module):
    """Pulls logits of real images to the running mean of the fake ones, and the other way round (Tseng et al. 2021).

    The running means are buffers, so that a resumed run has them; they start at 0, near an untrained discriminator.
    """

    real: Tensor
    fake: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty (equation 3, one-sided as in the authors' code) from logits of any shape."""
        above = functional.relu(real.float() - self.fake).square().mean()
        below = functional.relu(self.real - fake.float()).square().mean()
        return above + below

    def update(self, real: Tensor, fake: Tensor) -> None:
        """Move the running means towards the mean logits of one update, the same on every rank."""
        self.real.lerp_(real, 1 - LECAM_DECAY)
        self.fake.lerp_(fake, 1 - LECAM_DECAY)
