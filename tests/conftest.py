"""Images and a config small enough that every command takes a second."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images.config import ImagesConfig
from data.images.fashion import find_folder
from data.images.source import ImagesError

TINY = """
images: {{kind: folder, path: {path}, size: 16, val_share: 0.2}}
tokenizer:
  attention: sit-sc
  scales: 3
  patch: 2
  encoder: {{depth: 1, width: 32, heads: 4}}
  decoder: {{depth: 1, width: 32, heads: 4}}
  quantizer: {{kind: cosine, codes: 16, code_dim: 8, revive_every: 2}}
tokenizer_training:
  max_steps: 6
  batch_size_per_device: 4
  precision: "32"
  learning_rate: 1.0e-3
  warmup_steps: 1
  perceptual: none
  adversarial_start: 2
  adversarial_ramp_steps: 2
  discriminator_width: 8
  discriminator_layers: 2
  log_every: 2
  checkpoint_every: 3
  validate_every: 3
  validation_images: 8
  fit_images: 16
prior: {{depth: 1, width: 32, heads: 4}}
prior_training:
  max_steps: 6
  batch_size_per_device: 4
  precision: "32"
  warmup_steps: 1
  log_every: 2
  checkpoint_every: 3
  validate_every: 3
  validation_samples: 8
eval: {{num_images: 8, num_samples: 8, batch_size: 8, classifier_steps: 3}}
trainer: {{accelerator: cpu, num_workers: 0, progress: false}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``ORDER=<any number>`` runs files in a random order of that seed, and the tests of each file, too."""
    if seed := os.environ.get("ORDER"):
        chance = random.Random(seed)
        by_file: dict[Path, list[pytest.Item]] = {}
        for item in items:
            by_file.setdefault(item.path, []).append(item)
        files = list(by_file.values())
        for tests in (files, *files):
            chance.shuffle(tests)
        items[:] = [item for tests in files for item in tests]


@pytest.fixture(autouse=True)
def fashion_files(request: pytest.FixtureRequest) -> None:
    """Tests marked ``fashion`` are skipped where the files are not; where everything must be installed they fail."""
    if "fashion" in request.keywords:
        try:
            find_folder(ImagesConfig())
        except ImagesError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 20 smooth random images of 16 px each."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir()
        for index in range(20):
            coarse = generator.integers(0, 128, (4, 4, 3), dtype=np.uint8)
            coarse[..., 2 - label] += 120
            Image.fromarray(coarse).resize((16, 16)).save(folder / name / f"{index:03d}.png")
    return folder


@pytest.fixture
def tiny(tmp_path: Path, image_folder: Path) -> Path:
    """A YAML with all four stages at toy size."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(path=image_folder))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A run with tokenizer, tokens and prior, in ``run`` beside its ``tiny.yaml``. Copy it before changing it."""
    from pipeline.__main__ import main

    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY.format(path=image_folder))
    for command in ("train-tokenizer", "cache-tokens", "train-prior"):
        assert main([command, str(folder / "tiny.yaml"), f"run={folder}/run"]) == 0
    return folder
