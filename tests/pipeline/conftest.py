"""Images for several tests, a run as the studio holds it, and files that somebody may drop on its page."""

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from pipeline.config import load_config
from pipeline.evaluate import evaluate
from pipeline.models import load_models
from pipeline.studio_actions import Studio
from stages.measures.config import EvalConfig
from tests.pipeline.toy_evaluation import CLASSES, toy_run, write_baseline


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
def bright_and_dark(tmp_path_factory):
    """Two classes of 20 training and 8 held-out pictures."""
    folder = tmp_path_factory.mktemp("bright_and_dark")
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 8)):
        for index, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 128, (16, 16, 3)) + (128 if index == 0 else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory, bright_and_dark):
    """The folder of an evaluation with everything that a toy run can have."""
    run = tmp_path_factory.mktemp("run")
    config = toy_run(run, bright_and_dark, with_prior=True, attention="sit-sc")
    config.sampling.guidance = 30.0  # an untrained prior hardly listens
    config.eval = EvalConfig(
        **{
            **vars(config.eval),
            "baseline": str(write_baseline(run / "baseline.safetensors")),
            "timing_repeats": 2,
            "upsample_from": 8,
            "num_upsampled": 6,
            "edit_frozen": [1],
            "num_edited": 5,
        }
    )
    with SummaryWriter(str(run / "tokenizer" / "logs")) as writer:
        for step in range(30):
            writer.add_scalar("loss/pixel", 1 / (step + 1), step)
        writer.add_scalar("validation/psnr", 20, 30)
    return evaluate(config)


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
