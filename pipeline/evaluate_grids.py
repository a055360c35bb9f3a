"""More pictures of new samples for ``eval``: grids under other settings, and samples while they grow."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.layout import TokenLayout, Tokens
from pipeline.config import Config, ConfigError
from pipeline.evaluation_images import prompts_of
from pipeline.evaluation_pictures import NUM_SHOWN, prefix_name, show_samples
from pipeline.models import Models
from stages.measures.pictures import sheet
from stages.prior.sampling import SamplingConfig, check_sampling


def shown_settings(config: Config, layout: TokenLayout) -> dict[str, SamplingConfig]:
    """The sampling settings of ``eval.grids`` by name. Raises ConfigError or InputError for one that cannot be."""
    found = {}
    for item in config.eval.grids:
        # one change to the defaults, not to the run's own settings: two truncations at once would be neither
        base = OmegaConf.structured(SamplingConfig(guidance=config.sampling.guidance))
        try:
            settings = OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.from_dotlist([item])))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"eval.grids: {item}: {reason}; write it like top_p=[0.6], a key of sampling") from error
        assert isinstance(settings, SamplingConfig)
        check_sampling(settings, layout)
        found["".join(letter for letter in item if letter not in "[] ").replace("=", "_")] = settings
    return found


def show_grids(config: Config, folder: Path, models: Models, class_names: tuple[str, ...]) -> None:
    """A picture of new samples for each entry of ``eval.grids``: ten of every class, or of none."""
    for name, settings in shown_settings(config, models.prior.layout).items():
        count = NUM_SHOWN * max(1, len(class_names))
        labels = torch.arange(count) % len(class_names) if class_names else torch.full((count,), -1)
        seeds = [config.eval.seed + index for index in range(count)]
        drawn = models.decode(models.draw(prompts_of(models, labels, [""] * count), settings, seeds))
        show_samples(folder, drawn, labels, class_names, f"samples_{name}.png")


def show_growing(folder: Path, models: Models, tokens: Tokens) -> None:
    """The first samples, scale by scale, where the decoder can stop."""
    layout = models.tokenizer.layout
    if not layout.decodes_prefixes or len(layout.prefixes) < 2:
        return
    columns = [models.decode(models.tokenizer.first_scales(tokens, k)) for k in layout.prefixes]
    rows = list(zip(*columns, strict=True))
    sheet(rows, column_labels=[prefix_name(layout, k) for k in layout.prefixes]).save(folder / "growing.png")
