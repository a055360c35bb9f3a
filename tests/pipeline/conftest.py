"""A run as the studio holds it, and files that somebody may drop on its page."""

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
def uploads(tmp_path_factory, image_folder):
    """Files that somebody may drop on the page."""
    folder = tmp_path_factory.mktemp("uploads")
    source = Image.open(image_folder / "green/000.png")
    source.save(folder / "full.png")
    source.resize((8, 8), Image.Resampling.BOX).save(folder / "small.png")
    (folder / "text.png").write_text("no picture")
    Image.new("1", (20_000, 10)).save(folder / "long.png")
    return folder
