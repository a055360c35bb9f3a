"""Model files: safetensors with config, layout and history as JSON in the metadata. No pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from data.errors import OctavesError
from data.files import file_sha256, write_atomically
from data.layout import TokenLayout
from stages.contract import Prior, Tokenizer
from stages.factory import (
    build_prior,
    build_tokenizer,
    condition_config,
    head_config,
    prior_config,
    quantizer_config,
    tokenizer_config,
)

FORMAT = "octaves/1"
PARTS_WITH_KINDS = {"quantizer": quantizer_config, "head": head_config}
"""Parts of a tokenizer config whose dataclass depends on their ``kind``."""


MEND = "delete it and run the command that makes it again"


class WeightsError(OctavesError, ValueError):
    """A weights file is missing, damaged or of another kind."""


def save_weights(
    path: Path, module: nn.Module, metadata: dict[str, Any], state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the state of a module and JSON metadata atomically, with a checksum of both.

    Pass ``state`` if the module itself holds only a shard of it.
    """
    state = module.state_dict() if state is None else state
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    text = json.dumps(metadata, sort_keys=True)
    header = {"format": FORMAT, "octaves": text, "sha256": checksum(text, tensors)}
    write_atomically(path, in_order(save(tensors, metadata=header)))


def in_order(content: bytes) -> bytes:
    """Sort the header of a safetensors file, so that equal weights are equal bytes. safetensors shuffles metadata."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def checksum(metadata: str, tensors: dict[str, Tensor]) -> str:
    """Hex sha256 of the metadata and of the names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(metadata.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors by name). Raises WeightsError if the file is not a valid file of ``save_weights``."""
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        header = file.metadata()
        # old files have no checksum
        if header.get("sha256", (actual := checksum(header["octaves"], tensors))) != actual:
            raise WeightsError(f"{path}: damaged, its checksum is not the one that was written; {MEND}")
        return metadata, tensors


def read_metadata(path: Path) -> dict[str, Any]:
    """Only the metadata. Raises WeightsError if the file is not a valid file of ``save_weights``."""
    with _opened(path) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Context with (open file, its metadata)."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise WeightsError(f"{path}: format {header.get('format')!r}, expected {FORMAT!r}")
            metadata = json.loads(header["octaves"])
            if not isinstance(metadata, dict):
                raise WeightsError(f"{path}: its metadata are no JSON object")
            yield file, metadata
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise WeightsError(f"{path}: damaged or not a weights file ({error})") from error


def load_state(path: Path, module: nn.Module, tensors: dict[str, Any]) -> None:
    """Strict ``load_state_dict``. Raises WeightsError, which names the file."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # torch's message has several lines
        raise WeightsError(f"{path}: weights do not fit their own config ({reason})") from error


def save_tokenizer(path: Path, tokenizer: Tokenizer, config: Any, extra: dict[str, Any] | None = None) -> None:
    """Write a tokenizer for ``load_tokenizer``. ``config.path`` is left out: it is a setting of the user."""
    plain = {key: value for key, value in asdict(config).items() if key != "path"}
    metadata = {
        "part": "tokenizer",
        "kind": config.kind,
        "config": plain,
        "image_size": list(tokenizer.layout.image_size),
        "channels": tokenizer.channels,
        "layout": tokenizer.layout.to_dict(),
        "pixel_range": [-1, 1],
        "statistics": tokenizer.statistics(),
        **(extra or {}),
    }
    save_weights(path, tokenizer, metadata)


def load_tokenizer(path: str | Path) -> tuple[Tokenizer, dict[str, Any]]:
    """(tokenizer in eval mode without gradients, metadata). Raises WeightsError."""
    path = Path(path)
    metadata, tensors = read_weights(path)
    if metadata.get("part") != "tokenizer":
        raise WeightsError(f"{path}: holds a {metadata.get('part')}, not a tokenizer")
    try:
        config = from_plain(tokenizer_config(metadata["kind"]), metadata["config"])
        height, width = metadata["image_size"]
        tokenizer = build_tokenizer(config, (height, width), metadata["channels"])
        tokenizer.restore(metadata.get("statistics", {}))
        layout = TokenLayout.from_dict(metadata["layout"])
    except Exception as error:  # invalid metadata can raise any exception
        raise WeightsError(f"{path}: metadata do not describe a tokenizer ({error})") from error
    load_state(path, tokenizer, tensors)
    if layout != tokenizer.layout:
        raise WeightsError(f"{path}: the stored layout differs from the layout of its config")
    return tokenizer.eval().requires_grad_(False), metadata


def tokens_sha256(path: str | Path) -> str:
    """Identity of the tokens of a tokenizer file: its sha256, or that of the file it was started from (``take_over``).

    Raises WeightsError.
    """
    metadata = read_metadata(Path(path))
    return str(metadata.get("tokens_of") or file_sha256(Path(path)))


def take_over(tokenizer: Tokenizer, config: Any, path: str | Path) -> dict[str, Any]:
    """Copy weights and statistics of a finished tokenizer into a new one, and freeze all but its head.

    Returns metadata for the new file. Raises WeightsError if the configs differ in more than the head.
    """
    finished, metadata = load_tokenizer(path)
    plain = asdict(from_plain(type(config), metadata["config"])) if metadata["kind"] == config.kind else {}
    expected = {"image_size": list(tokenizer.layout.image_size), "channels": tokenizer.channels, **asdict(config)}
    stored = {"image_size": metadata["image_size"], "channels": metadata["channels"], **plain, "kind": metadata["kind"]}
    for key in ("kind", *expected):
        if key not in ("path", "head") and stored.get(key) != expected[key]:
            raise WeightsError(
                f"tokenizer_training.start_from={path} is another tokenizer: its {key} is {stored.get(key)}, here "
                f"{expected[key]}; only tokenizer.head may differ"
            )
    copied = {name: tensor for name, tensor in finished.state_dict().items() if not name.startswith("head.")}
    tokenizer.load_state_dict(copied, strict=False)
    tokenizer.restore(finished.statistics())
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    kept = {key: metadata[key] for key in ("perceptual",) if key in metadata}
    return {**kept, "tokens_of": tokens_sha256(path)}


def save_prior(
    path: Path,
    prior: Prior,
    config: Any,
    condition: Any,
    extra: dict[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a prior for ``load_prior``. ``extra`` contains the sha256 of its tokenizer.

    ``state`` is as in ``save_weights``.
    """
    metadata = {
        "part": "prior",
        "kind": config.kind,
        "config": {key: value for key, value in asdict(config).items() if key != "path"},
        "condition": asdict(condition),
        "layout": prior.layout.to_dict(),
        "class_names": prior.class_names,
        "text": prior.text,
        **extra,
    }
    save_weights(path, prior, metadata, state)


def load_prior(path: str | Path) -> tuple[Prior, dict[str, Any]]:
    """(prior in eval mode without gradients, metadata). Raises WeightsError."""
    path = Path(path)
    metadata, tensors = read_weights(path)
    if metadata.get("part") != "prior":
        raise WeightsError(f"{path}: holds a {metadata.get('part')}, not a prior")
    try:
        config = from_plain(prior_config(metadata["kind"]), metadata["config"])
        condition = from_plain(condition_config(metadata["condition"]["kind"]), metadata["condition"])
        layout = TokenLayout.from_dict(metadata["layout"])
        prior = build_prior(config, condition, layout, metadata["class_names"], metadata.get("text"))
    except Exception as error:  # invalid metadata can raise any exception
        raise WeightsError(f"{path}: metadata do not describe a prior ({error})") from error
    load_state(path, prior, tensors)
    return prior.eval().requires_grad_(False), metadata


def check_pair(prior: dict[str, Any], prior_path: str | Path, tokenizer_path: str | Path) -> None:
    """Raise WeightsError unless the prior was trained on tokens of this tokenizer. ``prior`` is its metadata."""
    tokenizer_sha256 = tokens_sha256(tokenizer_path)
    if prior.get("tokenizer_sha256") != tokenizer_sha256:
        raise WeightsError(
            f"{prior_path} was trained on tokens of another tokenizer than {tokenizer_path} "
            f"({str(prior.get('tokenizer_sha256'))[:12]}, not {tokenizer_sha256[:12]}); run "
            "`make cache-tokens train-prior` again in a new RUN=, or set tokenizer.path to the right one"
        )


def from_plain(config_class: type[Any], plain: dict[str, Any]) -> Any:
    """Build a config dataclass from plain data, including nested dataclasses.

    Raises TypeError or ValueError for unknown keys.
    """
    values = dict(plain)
    hints = get_type_hints(config_class)
    for name, value in plain.items():
        if name in PARTS_WITH_KINDS:
            values[name] = from_plain(PARTS_WITH_KINDS[name](value["kind"]), value)
        elif is_dataclass(hints.get(name)):
            values[name] = from_plain(hints[name], value)
    return config_class(**values)
