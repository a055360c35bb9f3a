"""A toy run that nothing disturbed, for what disturbed ones must end with."""

import time
from pathlib import Path

import pytest

from tests.reliability.commands import octaves
from tests.reliability.stages import FOLDERS, arguments


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """A run whose stages were made one after the other by processes like those that are killed."""
    folder = tmp_path_factory.mktemp("stages")
    for command in FOLDERS:
        started = time.monotonic()
        assert octaves(folder, *arguments(command, finished, folder / "run")).code == 0
        (folder / f"{command}.seconds").write_text(str(time.monotonic() - started))
    return folder
