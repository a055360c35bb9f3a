"""sample: generate images with a trained prior, as a grid and as single files."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config
from pipeline.models import load_models
from pipeline.own_keys import SampleRequest
from pipeline.requests import parse_prompts, save_pictures, to_prompts
from stages.measures.pictures import sheet


def sample_images(config: Config, request: SampleRequest) -> Path:
    """Write ``grid.png`` (enlarged, one row per prompt) and one PNG per image. Returns the path of the grid."""
    models = load_models(config)
    combinations = parse_prompts(request, models.prior)
    rows = [prompt for prompt in combinations for _ in range(request.count)]
    seeds = [request.seed + index for index in range(len(rows))]
    pictures = models.decode(models.draw(to_prompts(models, rows), config.sampling, seeds))
    out = Path(request.out)
    save_pictures(out, [f"{row.file_name}-{seed:06d}" for row, seed in zip(rows, seeds, strict=True)], pictures)
    names = [prompt.name for prompt in combinations]
    sheet(pictures.split(request.count), names if any(names) else ()).save(out / "grid.png")
    print(f"wrote {out / 'grid.png'} and {len(pictures)} images beside it")
    return out / "grid.png"
