"""Weights on disk: safetensors with the config, layout and history as JSON in the metadata. No pickle."""

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
"""Parts of a tokenizer's config whose dataclass their ``kind`` chooses."""


MEND = "delete it and run the command that makes it again"


class WeightsError(OctavesError, ValueError):
    """A weights file that is missing, damaged or of another kind."""


def save_weights(
    path: Path, module: nn.Module, metadata: dict[str, Any], state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the module's state and JSON metadata atomically, with a checksum of both.

    ``state`` is the state where the module itself has but a share of it.
    """
    state = module.state_dict() if state is None else state
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    text = json.dumps(metadata, sort_keys=True)
    header = {"format": FORMAT, "octaves": text, "sha256": checksum(text, tensors)}
    write_atomically(path, in_order(save(tensors, metadata=header)))


def in_order(content: bytes) -> bytes:
    """A safetensors file with its header in order: safetensors shuffles metadata, and equal weights are equal bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def checksum(metadata: str, tensors: dict[str, Tensor]) -> str:
    """Hex sha256 of metadata and of names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256(metadata.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors by name). Raises WeightsError for anything but a file that ``save_weights`` wrote."""
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        header = file.metadata()
        # files from before there was one have none
        if header.get("sha256", (found := checksum(header["octaves"], tensors))) != found:
            raise WeightsError(f"{path}: damaged, its checksum is not the one that was written; {MEND}")
        return metadata, tensors


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone. Raises WeightsError for anything but a file that ``save_weights`` wrote."""
    with _opened(path) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(the open file, its metadata)."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise WeightsError(f"{path}: format {header.get('format')!r}, expected {FORMAT!r}")
            metadata = json.loads(header["octaves"])
            if not isinstance(metadata, dict):
                raise WeightsError(f"{path}: its metadata are no mapping")
            yield file, metadata
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise WeightsError(f"{path}: damaged or not a weights file ({error})") from error


def load_state(path: Path, module: nn.Module, tensors: dict[str, Any]) -> None:
    """Strict load; raises WeightsError that names the file."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # torch's is of several lines
        raise WeightsError(f"{path}: weights do not fit their own config ({reason})") from error


def save_tokenizer(path: Path, tokenizer: Tokenizer, config: Any, extra: dict[str, Any] | None = None) -> None:
    """Write a tokenizer with all that ``load_tokenizer`` needs. ``config.path`` is the user's, not the model's."""
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
    except Exception as error:  # whatever a model of foreign numbers breaks on
        raise WeightsError(f"{path}: metadata do not describe a tokenizer ({error})") from error
    load_state(path, tokenizer, tensors)
    if layout != tokenizer.layout:
        raise WeightsError(f"{path}: the stored layout is not the one that its config gives")
    return tokenizer.eval().requires_grad_(False), metadata


def tokens_sha256(path: str | Path) -> str:
    """Whose tokens a tokenizer file makes: its own sha256, or that of the file whose tokens it took over.

    Raises WeightsError.
    """
    metadata = read_metadata(Path(path))
    return str(metadata.get("tokens_of") or file_sha256(Path(path)))


def take_over(tokenizer: Tokenizer, config: Any, path: str | Path) -> dict[str, Any]:
    """Weights and statistics of a finished tokenizer for a fresh one, frozen; its head alone is left to train.

    Returns what the new file says of that. Raises WeightsError where more than the head differs.
    """
    finished, metadata = load_tokenizer(path)
    plain = asdict(from_plain(type(config), metadata["config"])) if metadata["kind"] == config.kind else {}
    wanted = {"image_size": list(tokenizer.layout.image_size), "channels": tokenizer.channels, **asdict(config)}
    found = {"image_size": metadata["image_size"], "channels": metadata["channels"], **plain, "kind": metadata["kind"]}
    for key in ("kind", *wanted):
        if key not in ("path", "head") and found.get(key) != wanted[key]:
            raise WeightsError(
                f"tokenizer_training.start_from={path} is another tokenizer: its {key} is {found.get(key)}, here "
                f"{wanted[key]}; only tokenizer.head may differ"
            )
    own = {name: tensor for name, tensor in finished.state_dict().items() if not name.startswith("head.")}
    tokenizer.load_state_dict(own, strict=False)
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
    """Write a prior with all that ``load_prior`` needs; ``extra`` names the tokenizer that it belongs to.

    ``state`` as in ``save_weights``.
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
    except Exception as error:  # whatever a model of foreign numbers breaks on
        raise WeightsError(f"{path}: metadata do not describe a prior ({error})") from error
    load_state(path, prior, tensors)
    return prior.eval().requires_grad_(False), metadata


def check_pair(prior: dict[str, Any], prior_path: str | Path, tokenizer_path: str | Path) -> None:
    """Raise WeightsError unless the prior (its metadata) was trained on tokens of exactly this tokenizer file."""
    found = tokens_sha256(tokenizer_path)
    if prior.get("tokenizer_sha256") != found:
        raise WeightsError(
            f"{prior_path} was trained on tokens of another tokenizer than {tokenizer_path} "
            f"({str(prior.get('tokenizer_sha256'))[:12]}, not {found[:12]}); run `make cache-tokens train-prior` again "
            "in a new RUN=, or point tokenizer.path to the right one"
        )


def from_plain(config_class: type[Any], plain: dict[str, Any]) -> Any:
    """A config dataclass from plain data, nested ones too.

    Raises TypeError or ValueError for keys that the dataclass does not have.
    """
    values = dict(plain)
    hints = get_type_hints(config_class)
    for name, value in plain.items():
        if name in PARTS_WITH_KINDS:
            values[name] = from_plain(PARTS_WITH_KINDS[name](value["kind"]), value)
        elif is_dataclass(hints.get(name)):
            values[name] = from_plain(hints[name], value)
    return config_class(**values)
