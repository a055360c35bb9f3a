"""The README's commands exist, and the Makefile explains itself."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_make_target_in_the_readme_exists_and_has_help():
    makefile = (ROOT / "Makefile").read_text()
    documented = set(re.findall(r"^([a-z-]+):.*##", makefile, re.M))
    named = set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", (ROOT / "README.md").read_text()))
    assert named and named <= documented
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(target in listed for target in documented)


def test_every_file_that_the_readme_links_exists():
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_keys_in_the_readme_are_real_keys():
    from pipeline.config import load_config

    for command in re.findall(
        r"python -m pipeline [a-z-]+ (\S+)((?: [a-z_.]+=\S+)*)", (ROOT / "README.md").read_text()
    ):
        name, overrides = command
        keys = [item for item in overrides.split() if item.split("=")[0] not in ("classes", "count", "seed", "out")]
        if not name.isupper() and (ROOT / f"configs/{name}.yaml").exists():
            load_config(name, keys)
