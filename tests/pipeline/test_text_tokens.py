"""The bytes of a text as a token cache: what is stored is the text, and a prior trains on it without a tokenizer."""

import numpy as np
import pytest

from data.tokens.reader import TokenReader
from stages.weights import load_prior
from tests.pipeline.runs import caller, write_tiny

TEXT = "".join(f"{number} bottles of beer, Würzburg style. " for number in range(300)).encode()


@pytest.fixture
def call(tmp_path, image_folder):
    write_tiny(tmp_path, image_folder)
    (tmp_path / "beer.txt").write_bytes(TEXT)
    return caller(tmp_path, "condition.kind=none")


def test_the_pieces_are_the_text_and_train_a_prior(call, tmp_path):
    assert call("text-tokens", f"file={tmp_path}/beer.txt", "length=32") == 0
    found = {}
    for split in ("train", "val"):
        reader = TokenReader(tmp_path / "run/tokens", split)
        reader.verify()
        ids = reader.read(np.arange(len(reader)))["ids"][..., 0]
        found[split] = ids[np.argsort(reader.source_indices)].astype(np.uint8).tobytes()
        assert (reader.labels == -1).all()
    count = len(TEXT) // 32
    assert found["train"] + found["val"] == TEXT[: 32 * count] and len(found["val"]) == 32 * int(0.05 * count)
    assert call("train-prior", "prior.averaging=mix") == 0
    prior, _ = load_prior(tmp_path / "run/prior/prior.safetensors")
    assert prior.layout.max_vocabulary_size == 256 and prior.averages is not None
    assert call("text-tokens", f"file={tmp_path}/beer.txt", "length=32") == 2  # never over another one


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (("file={folder}/none.txt",), "no such file; give a text file"),
        (("file={folder}/beer.txt", "length=1"), "length=1"),
        (("file={folder}/beer.txt", "held_out=1"), "held_out=1"),
        (("file={folder}/beer.txt", "length=20000"), "too few for training and held-out pieces of 20000"),
    ],
)
def test_a_text_that_cannot_be_cut_is_named(call, tmp_path, capsys, items, message):
    assert call("text-tokens", *(item.format(folder=tmp_path) for item in items)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run/tokens/manifest.json").exists()
