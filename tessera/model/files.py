"""The files of a base model: where they are, what the model is called, its digest. Needs no torch."""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tessera.defaults import BUNDLED_MODEL
from tessera.errors import UnsupportedModel

#: The files of a model, in the order in which they enter its digest. Pickled weights are never loaded.
_WEIGHT_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")
#: Files hashed at the same time. One core hashes 1.3 GB per second.
_MAX_DIGESTS = 4


def model_name(source: str | Path) -> str:
    """Return the name of the base model for clients: the last part of its directory or hub id."""
    return Path(os.path.abspath(source)).name if Path(source).exists() else str(source).split("/")[-1]


def public_source(source: str | Path) -> str:
    """Return how others find the base model: its hub id, or the name of its directory without the path."""
    return model_name(source) if Path(source).exists() else str(source)


def model_folder(source: str | Path, *, revision: str | None = None) -> Path:
    """Return the local directory of a model, fetched from the hub if `source` is not a directory."""
    if Path(source).is_dir():
        return Path(source)
    if str(source) == str(BUNDLED_MODEL):
        raise UnsupportedModel(
            "the bundled model is in the repository, not in the package: name a base model, by a directory "
            "in transformers' format or a hub id (TESSERA_BASE_MODEL for the service and the worker)",
            param="base_model",
        )
    try:
        from huggingface_hub import snapshot_download

        patterns = [*_WEIGHT_PATTERNS, "*.json", "*.jinja", "*.model"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise UnsupportedModel(
            f"{source} is neither a directory nor a model that can be fetched from the hub: {error}",
            param="base_model",
        ) from error


def model_digest(folder: Path) -> str:
    """Compute SHA-256 over the names and contents of config.json and the weight files, as hex.

    A file in the hub's cache is a link to a blob that is named by its SHA-256. That name is used instead of
    reading gigabytes. Raises `UnsupportedModel` if the folder has no safetensors file.
    """
    names = sorted({path.name for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern)})
    if not any(name.endswith(".safetensors") for name in names):
        raise UnsupportedModel(f"{folder} has no *.safetensors file; pickled weights are not loaded")
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_MAX_DIGESTS) as together:  # hashing releases the interpreter lock
        for name, file_digest in zip(
            names, together.map(_file_digest, [folder / name for name in names]), strict=True
        ):
            digest.update(f"{name}\0{file_digest}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    blob = path.resolve().name
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
