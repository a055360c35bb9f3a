"""The README and the pages in docs/: commands, keys, links and YAMLs are valid, and the Makefile explains itself."""

import re
import shlex
import subprocess
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md"))]
MOST_BYTES_OF_README = 10_000
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
CODE_SPAN = re.compile(r"`([^`]+)`")
PLACEHOLDERS = ("CONFIG", "NAME")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def code_lines(text):
    """The lines of all code blocks, and the code spans of the prose, each on one line."""
    blocks = "\n".join(block for _, block in FENCE.findall(text)).replace("\\\n", " ").splitlines()
    return blocks + [" ".join(span.split()) for span in CODE_SPAN.findall(FENCE.sub("", text))]


def make_targets():
    return set(re.findall(r"^([a-z-]+):.*##", text_of("Makefile"), re.M))


def targets_named_in(code):
    """The targets after each ``make`` that begins a command: more than one may follow."""
    for line in code:
        for call in re.findall(r"(?:^|&& |; |time )make((?: [a-z]+(?:-[a-z]+)*(?![\w=]))+)", line):
            yield from call.split()


def test_every_make_target_in_the_readme_exists_and_has_help():
    named = set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", text_of("README.md")))
    assert named and named <= make_targets()
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(target in listed for target in make_targets())


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_in_code_exists(page):
    assert set(targets_named_in(code_lines(text_of(page)))) <= make_targets()


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= MOST_BYTES_OF_README


def test_the_readme_has_the_test_command_that_the_checks_run():
    assert "make test" in commands_of("README.md") and "make test" in text_of(".ci/run").splitlines()


def commands_of(page):
    """The commands of a page's code blocks, without their comments."""
    return [line.split("#")[0].strip() for _, block in FENCE.findall(text_of(page)) for line in block.splitlines()]


# Links


def links_of(page):
    """(file, anchor) of every relative link and picture of a page; the file is empty for a link inside the page."""
    prose = CODE_SPAN.sub("code", FENCE.sub("", text_of(page)))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors_of(text):
    """The anchors that GitHub gives to the headings of a page."""
    found, times = set(), {}
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{anchor}-{times[anchor]}" if anchor in times else anchor)
        times[anchor] = times.get(anchor, 0) + 1
    return found


def test_anchors_are_those_of_github():
    text = "# f. Quantizers, and a default\n```\n# no heading\n```\n## `a` and [b](c)\n## Lengths\n## Lengths\n"
    assert anchors_of(text) == {"f-quantizers-and-a-default", "a-and-b", "lengths", "lengths-1"}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_anchor_exists(page):
    for file, anchor in links_of(page):
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.resolve().is_relative_to(ROOT) and target.exists(), f"{page} links to {file}"
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), f"{page} links to {file}#{anchor}"


def test_every_page_and_picture_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        for file, _ in links_of(page.relative_to(ROOT)):
            target = (page.parent / file).resolve() if file else page
            if target not in reached:
                reached.add(target)
                todo += [target] if target.suffix == ".md" else []
    generated = {path for path in ROOT.glob("docs/results/studies/*.md")}
    wanted = {path for pattern in ("*.md", "*.png") for path in ROOT.glob(f"docs/**/{pattern}")} - generated
    assert wanted <= reached, sorted(wanted - reached)


def test_every_file_of_results_is_named_on_a_page():
    said = "".join(text_of(page) for page in PAGES if page.startswith("docs/") and "/studies/" not in page)
    said = said.replace("`codes-*.json`", " ".join(path.name for path in ROOT.glob("docs/results/codes-*.json")))
    said = said.replace(
        "photos64-{patch,style}-{0,1}.json",
        "photos64-patch-0.json photos64-patch-1.json photos64-style-0.json photos64-style-1.json",
    )
    assert [path.name for path in ROOT.glob("docs/results/*.json") if path.name not in said] == []


# Commands


def written_commands(text):
    """(command, config, overrides) of every command in code, as make or the shell would give them to octaves."""
    for line in code_lines(text):
        for call in re.split(r"&&|;", line):
            call = call.strip()
            if made := re.match(r"(?:time )?make ([a-z-]+(?: [a-z-]+)*) CONFIG=", call):
                given = dict(item.split("=", 1) for item in shlex.split(call, comments=True) if "=" in item)
                run = [f"run={given['RUN']}"] if "RUN" in given else []
                for target in made[1].split():
                    yield target, given["CONFIG"], [*run, *shlex.split(given.get("ARGS", ""))]
            elif called := re.search(
                r"(?:octaves|python -m pipeline) ([a-z-]+) ([\w./-]+)( (?:\$\w+ )?[a-z_.]+=.*)?", call
            ):
                yield called[1], called[2], shlex.split(called[3] or "", comments=True)


def own_keys_of(command):
    """The keys of a command that are not in the config."""
    from pipeline.__main__ import COMMANDS

    module, _, request = COMMANDS[command]
    return {field.name for field in fields(getattr(import_module(module), request))} if request else set()


def shipped(folder="configs"):
    return {path.stem for path in (ROOT / folder).glob("*.yaml")}


def check_command(command, name, overrides):
    """Fail for a command, config, study or key that is not there; returns the keys."""
    from pipeline.__main__ import COMMANDS, WITHOUT_CONFIG
    from pipeline.config import load_config

    assert command in COMMANDS, command
    keys = [item for item in overrides if "$" not in item and item.split("=")[0] not in own_keys_of(command)]
    if command == "study":
        assert name in shipped("configs/studies") or name in PLACEHOLDERS, name
    elif command not in WITHOUT_CONFIG and name not in PLACEHOLDERS:
        readers_own = name.endswith(".yaml") or name.startswith("runs/")
        assert name in shipped() or readers_own, f"no such config: {name}"
        if name in shipped():
            load_config(name, keys)
    return [item.split("=")[0] for item in overrides]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page):
    for command, name, overrides in written_commands(text_of(page)):
        check_command(command, name, overrides)


def test_commands_are_found():
    """The checks above see what they are there for."""
    keys_of, commands = [], set()
    for page in PAGES:
        for command, name, overrides in written_commands(text_of(page)):
            commands.add(command)
            keys_of += check_command(command, name, overrides)
    assert {"guidances", "text", "count", "sampling.guidance", "prior_training.max_steps", "run"} <= set(keys_of)
    assert {"eval", "sample", "upsample", "edit", "colorize", "export", "study", "orders", "plan", "bench"} <= commands


@pytest.mark.parametrize("line", ["octaves evall demo", "octaves eval demo2", "octaves study a-scale jobs=2"])
def test_a_command_that_is_not_there_is_found(line):
    ((command, name, overrides),) = written_commands(f"`{line}`")
    with pytest.raises(AssertionError):
        check_command(command, name, overrides)


def test_a_key_that_is_not_there_is_found():
    from pipeline.config import ConfigError

    for line in ('make eval sample CONFIG=demo ARGS="eval.nam=x"', "octaves eval demo eval.name=x prior.dept=3"):
        with pytest.raises(ConfigError):
            for command, name, overrides in written_commands(f"`{line}`"):
                check_command(command, name, overrides)


def test_every_module_that_is_run_exists():
    for page in PAGES:
        for name in re.findall(r"python -m ([\w.]+)", text_of(page)):
            assert find_spec(name) is not None, name


def test_every_config_and_command_is_documented():
    from pipeline.__main__ import COMMANDS

    spans = set(CODE_SPAN.findall(FENCE.sub("", text_of("docs/commands.md"))))
    assert shipped() <= spans, shipped() - spans
    said = "\n".join(line for page in PAGES for line in code_lines(text_of(page)))
    assert [name for name in COMMANDS if not re.search(rf"(octaves|make|pipeline) {name}\b", said)] == []


# Keys and YAMLs


@cache
def known_keys():
    """Every dotted key of every section, of every kind."""
    from pipeline.config import KINDS, Config
    from stages import factory

    registries = (factory.TOKENIZERS, factory.QUANTIZERS, factory.HEADS, factory.CONDITIONS, factory.PRIORS)
    kinds = {
        section: (lookup, registry) for (section, (_, lookup)), registry in zip(KINDS.items(), registries, strict=True)
    }

    def keys(part, section):
        for field in fields(part):
            name = f"{section}.{field.name}" if section else field.name
            yield name
            value = getattr(part, field.name)
            lookup, registry = kinds.get(name, (None, ()))
            for inner in [lookup(kind)() for kind in registry] if lookup else [value] if is_dataclass(value) else []:
                yield from keys(inner, name)

    return set(keys(Config(), ""))


def sections():
    from pipeline.config import Config

    return [field.name for field in fields(Config) if is_dataclass(getattr(Config(), field.name))]


@pytest.mark.parametrize("page", PAGES)
def test_every_key_in_the_prose_exists(page):
    """``prior.order``, ``prior.order=scale`` and ``prior.order: scale`` each name a key; the value is not checked."""
    for span in CODE_SPAN.findall(FENCE.sub("", text_of(page))):
        for key in re.findall(rf"^((?:{'|'.join(sections())})\.[a-z_.]*[a-z_])(?:$|=|: )", span):
            assert key in known_keys() or key.endswith((".safetensors", ".json")), f"{page}: {key}"


@pytest.mark.parametrize("page", PAGES)
def test_every_yaml_loads(page, tmp_path):
    from pipeline.config import load_config

    for number, block in enumerate(block for language, block in FENCE.findall(text_of(page)) if language == "yaml"):
        path = tmp_path / f"mine{number}.yaml"
        path.write_text(block, encoding="utf-8")
        load_config(path)
