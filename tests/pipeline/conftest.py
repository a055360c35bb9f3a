"""Images for several tests, a run as the studio holds it, and files that somebody may drop on its page."""

import numpy as np
import pytest
from PIL import Image

from pipeline.config import load_config
from pipeline.models import load_models
from pipeline.studio_actions import Studio


@pytest.fixture(scope="session")
def studio(finished):
    """The finished run, loaded."""
    config = load_config(finished / "tiny.yaml", [f"run={finished}/run"])
    return Studio(config, load_models(config))


@pytest.fixture(scope="session")
def gray(tmp_path_factory, image_folder):
    """Two gray images."""
    folder = tmp_path_factory.mktemp("gray")
    for number in range(2):
        Image.open(image_folder / f"green/00{number}.png").convert("L").save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def many_images(tmp_path_factory):
    """90 images of 16 px in two classes: enough held-out ones for measures that need many."""
    folder = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(0)
    for index in range(90):
        (folder / "ab"[index % 2]).mkdir(exist_ok=True)
        coarse = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16)).save(folder / "ab"[index % 2] / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def uploads(tmp_path_factory, image_folder):
    """Files that somebody may drop on the page."""
    folder = tmp_path_factory.mktemp("uploads")
    source = Image.open(image_folder / "green/000.png")
    source.save(folder / "full.png")
    source.resize((8, 8), Image.Resampling.BOX).save(folder / "small.png")
    (folder / "text.png").write_text("no picture")
    Image.new("1", (20_000, 10)).save(folder / "long.png")
    return folder
