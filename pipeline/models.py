"""The models of a run combined: prompts → tokens → images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.images.views import to_float, to_uint8
from data.layout import Tokens
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.placement import device_of
from pipeline.run import need
from stages.conditions.encoders import TextEncoder, load_text_encoder
from stages.contract import Prior, Prompts, Tokenizer
from stages.precision import resolve, running_in
from stages.prior.sampling import SamplingConfig, check_order, check_sampling, sample
from stages.weights import check_pair, load_prior, load_tokenizer

DENSE_ENCODER = "this tokenizer's encoder sees all scales at once; train one with tokenizer.attention=sit-sce or sit-sc"
"""Message where the tokens of a small image would have to be the first tokens of the large one, but are not."""


@dataclass(frozen=True)
class Models:
    """A tokenizer, its prior and the text encoder for captions, on one device."""

    tokenizer: Tokenizer
    prior: Prior
    text_encoder: TextEncoder | None
    """None if the prior does not use text."""
    device: torch.device
    batch_size: int
    """Sequences sampled at once; affects only speed."""
    progress: bool

    def prompts(self, labels: Sequence[int], texts: Sequence[str]) -> Prompts:
        """Prompts of class ids (-1: none) and captions (empty: none), one pair per sample, on the CPU.

        Raises RunError for a caption if the prior does not use captions.
        """
        if len(labels) != len(texts):
            raise RunError(f"{len(labels)} classes for {len(texts)} captions; give one pair for each image")
        plain = Prompts.of_labels(torch.tensor(labels, dtype=torch.int64))
        unique_texts = [text for text in dict.fromkeys(texts) if text]
        if not unique_texts:
            return plain
        if self.text_encoder is None:
            raise RunError("this prior was trained without captions; train one with condition.kind=text or class-text")
        states = dict(zip(unique_texts, map(torch.from_numpy, self.text_encoder.encode(unique_texts)), strict=True))
        first_states = states[unique_texts[0]]
        dtype = torch.float32 if first_states.is_floating_point() else torch.int64
        rows = [states.get(text, first_states[:0]).to(dtype) for text in texts]
        return Prompts(plain.labels, pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]))

    def check(self, settings: SamplingConfig) -> None:
        """Raise RunError or InputError for settings that this tokenizer or prior does not support."""
        layout = self.prior.layout
        check_sampling(settings, layout)
        check_order(settings, self.prior)
        if settings.scales not in (0, len(layout.scales)) and not layout.decodes_prefixes:
            raise RunError(
                f"sampling.scales={settings.scales}: this tokenizer's decoder needs all {len(layout.scales)} "
                "scales; train one with tokenizer.attention=sit-scd or sit-sc"
            )
        if settings.guidance != 1 and not self.prior.condition.dropout:
            raise RunError(
                f"guidance {settings.guidance:g}: this prior was trained without dropping its condition; use 1, "
                "or train one with condition.dropout above 0"
            )

    def draw(
        self,
        prompts: Prompts,
        settings: SamplingConfig,
        seeds: Sequence[int],
        prefix: Tokens | None = None,
        known: Tokens | None = None,
        keep: Tensor | None = None,
        whole: Sequence[int] = (),
    ) -> Tokens:
        """Sample tokens in batches, one sample per prompt, on the CPU. Arguments as in ``stages.prior.sampling``.

        Without ``prefix``, samples start with the start prefix of the tokenizer, if it has one. Raises RunError for a
        prefix that is too long for the prior.
        """
        count, parts = len(prompts), []
        if prefix is not None and prefix.ids.shape[1] > self.prior.max_length:
            raise RunError(
                f"{prefix.ids.shape[1]} tokens are given, but this prior models {self.prior.max_length}; train one "
                "with a larger prior.max_length, or give fewer scales"
            )
        size = min(self.batch_size, count)
        for start in tqdm(range(0, count, size), "Sampling", disable=not self.progress):
            # a compiled step needs one shape: the last batch is padded with its last row and cut afterwards
            rows = torch.arange(start, start + size).clamp(max=count - 1)
            prefix_rows, known_rows = (
                None if source is None else source[rows].to(self.device) for source in (prefix, known)
            )
            keep_rows = None if keep is None else keep[rows].to(self.device)
            batch_prompts, batch_seeds = prompts[rows].to(self.device), [seeds[row] for row in rows]
            if prefix_rows is None:
                start_prefix = self.tokenizer.start_prefix(prompts.labels[rows], batch_seeds)
                prefix_rows = None if start_prefix is None else start_prefix.to(self.device)
            with running_in(self.prior, resolve(settings.precision, self.device)):
                tokens = sample(
                    self.prior, batch_prompts, settings, batch_seeds, prefix_rows, known_rows, keep_rows, whole
                )
            parts.append(tokens[: count - start].to("cpu"))
        return Tokens.cat(parts)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tokens:
        """Encode images uint8 [N, C, h, w] to tokens on the CPU; small images give only the first scales.

        Raises RunError for another number of channels, PrefixUnsupported for small images if the encoder sees all
        scales at once.
        """
        check_channels(self.tokenizer, pixels.shape[1])
        parts = pixels.split(self.batch_size)
        return Tokens.cat([self.tokenizer.encode(to_float(part).to(self.device)).to("cpu") for part in parts])

    @torch.inference_mode()
    def decode(self, tokens: Tokens) -> Tensor:
        """Decode tokens, also prefixes of scales, to images uint8 [N, C, h, w] on the CPU."""
        parts = tokens.split(self.batch_size)
        return torch.cat([to_uint8(self.tokenizer.decode(part.to(self.device))).cpu() for part in parts])


def check_channels(tokenizer: Tokenizer, channels: int) -> None:
    """Raise RunError if the tokenizer requires another number of channels."""
    if channels != tokenizer.channels:
        raise RunError(
            f"images.channels={channels}, but this tokenizer takes {tokenizer.channels}; "
            "set images.channels to that, or choose another tokenizer.path"
        )


def check_images(tokenizer: Tokenizer, channels: int, height: int, width: int) -> None:
    """Raise RunError if the tokenizer requires another image size or number of channels."""
    check_channels(tokenizer, channels)
    required = tokenizer.layout.image_size
    if (height, width) != required:
        raise RunError(
            f"images of {height}x{width}, but this tokenizer takes {required[0]}x{required[1]}; "
            "set images.size to that, or choose another tokenizer.path"
        )


def load_models(config: Config) -> Models:
    """Load the models of a run on the device of ``trainer.accelerator``. Raises RunError, WeightsError, InputError."""
    tokenizer_path = need(config.tokenizer.path, "tokenizer", "train-tokenizer", config)
    prior_path = need(config.prior.path, "prior", "train-prior", config)
    prior, metadata = load_prior(prior_path)
    check_pair(metadata, prior_path, tokenizer_path)
    return assemble(config, load_tokenizer(tokenizer_path)[0], prior)


def assemble(config: Config, tokenizer: Tokenizer, prior: Prior) -> Models:
    """Combine models on the device of ``trainer.accelerator`` and check them against ``config.sampling``."""
    batch_size, progress = config.eval.batch_size, config.trainer.progress
    models = join(tokenizer, prior, device_of(config), batch_size, config.sampling.precision, progress)
    models.check(config.sampling)
    if config.sampling.compile:
        prior.compile_step()
    return models


def join(
    tokenizer: Tokenizer, prior: Prior, device: torch.device, batch_size: int, precision: str, progress: bool = False
) -> Models:
    """Combine models that belong together on a device, in a precision.

    Raises InputError if the text encoder is not available, or if the device does not support the precision.
    """
    encoder = load_text_encoder(prior.text) if prior.text is not None and prior.condition.uses_text else None
    tokenizer.precision = prior.precision = resolve(precision, device)
    return Models(tokenizer.to(device), prior.to(device), encoder, device, batch_size, progress)
