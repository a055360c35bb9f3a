"""A start loads no more than it needs: what stands in ``sys.modules`` of fresh interpreters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.untrained import write_run

ROOT = Path(__file__).parent.parent
TRAINING = ["lightning", "pytorch_lightning", "torchmetrics", "tensorboard", "timm", "torchvision", "transformers"]
HEAVY = [*TRAINING, "matplotlib", "gradio", "scipy", "sklearn", "webdataset"]
COMMANDS = [
    "compare",
    "edit",
    "evaluate",
    "export",
    "orders",
    "rates",
    "reconstruct",
    "studies.command",
    "studio",
    "sweep",
]
"""Modules of commands that neither train nor cache."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_folder):
    """(folder of a run that was never trained, its config and keys as commands want them)."""
    folder = tmp_path_factory.mktemp("untrained")
    return folder / "run", write_run(folder, image_folder, "sit")


def imported(steps, forbidden):
    """For each step, a line of Python, the forbidden packages that are there after it; all in one new process."""
    code = ["import json, sys", "found = {}"]
    for step in steps:
        code += [step, f"found[{step!r}] = [name for name in {forbidden!r} if name in sys.modules]"]
    code.append("print(json.dumps(found))")
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_is_loaded_and_samples_without_what_training_needs(run):
    steps = ["import octaves", f"octaves.load({str(run[0])!r}, device='cpu').sample(classes=['red'])"]
    assert imported(steps, HEAVY) == {step: [] for step in steps}


def test_the_command_sample_runs_without_what_training_needs(run, tmp_path):
    arguments = ["sample", *run[1], "classes=red", "count=1", f"out={tmp_path}"]
    steps = ["import pipeline.sample", f"from pipeline.__main__ import main; assert main({arguments!r}) == 0"]
    assert imported(steps, HEAVY) == {step: [] for step in steps}
    assert (tmp_path / "grid.png").is_file()


def test_help_and_wrong_keys_are_answered_before_torch_is_loaded():
    steps = [
        "from pipeline.__main__ import main",
        "assert main(['--help']) == 0",
        "assert main(['tokenize']) == 2",
        "assert main(['train-prior', 'demo', 'nonsense=1']) == 2",
        "assert main(['train-tokenizer', 'demo', 'tokenizer.quantizer.nonsense=1']) == 2",
        "assert main(['sample', 'demo', 'condition.kind=nonsense']) == 2",
        "assert main(['eval', 'demo', 'prior.order=nonsense']) == 2",
        "assert main(['studio', 'demo', 'nonsense=1']) == 2",
        "assert main(['sweep', 'demo', 'tokenizer.transform=nonsense']) == 2",
    ]
    assert imported(steps, [*HEAVY, "torch"]) == {step: [] for step in steps}


def test_commands_that_neither_train_nor_cache_import_nothing_of_training():
    steps = [f"import pipeline.{name}" for name in COMMANDS]
    assert imported(steps, TRAINING) == {step: [] for step in steps}
