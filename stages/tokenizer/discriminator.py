"""The adversary of stage 1: a PatchGAN with spectral normalisation and the hinge loss."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm


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


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator from logits of any shape (Lim & Ye 2017)."""
    return 0.5 * (functional.relu(1 - real.float()).mean() + functional.relu(1 + fake.float()).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Hinge loss of the generator."""
    return -fake.float().mean()
