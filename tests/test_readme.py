"""The README's commands exist, and the Makefile explains itself."""

import re
import shlex
import subprocess
from dataclasses import fields
from importlib import import_module
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


def written_commands(text):
    """(command, config, overrides) of every command in code, as make or the shell would give them to octaves."""
    code = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) + re.findall(r"`([^`\n]+)`", text))
    for line in code.replace("\\\n", " ").splitlines():
        if made := re.match(r"make ([a-z-]+) CONFIG=", line):
            given = dict(item.split("=", 1) for item in shlex.split(line, comments=True) if "=" in item)
            run = [f"run={given['RUN']}"] if "RUN" in given else []
            yield made[1], given["CONFIG"], [*run, *shlex.split(given.get("ARGS", ""))]
        elif called := re.search(r"(?:octaves|python -m pipeline) ([a-z-]+) ([\w.-]+)( [a-z_.]+=.*)?", line):
            yield called[1], called[2], shlex.split(called[3] or "", comments=True)


def test_commands_in_the_readme_are_understood():
    from pipeline.__main__ import COMMANDS
    from pipeline.config import load_config

    keys_of = []
    for page in ("README.md", "docs/results/README.md"):
        for command, name, overrides in written_commands((ROOT / page).read_text()):
            if not (ROOT / f"configs/{name}.yaml").exists():
                continue  # a reader's own YAML, or the folder of a run
            module, _, request = COMMANDS[command]
            own = {field.name for field in fields(getattr(import_module(module), request))} if request else set()
            keys = [item for item in overrides if item.split("=")[0] not in own and "$" not in item]
            load_config(name, keys)
            keys_of += [item.split("=")[0] for item in overrides]
    assert {"guidances", "text", "count", "sampling.guidance", "prior_training.max_steps", "run"} <= set(keys_of)
