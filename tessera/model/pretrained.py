"""Load the weights of a folder such that all of them are the folder's own, or say in a sentence why not.

transformers only warns where a file lacks weights that config.json asks for, and fills them with random
numbers: half a download, or a config of other sizes, would be served without an error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tessera.errors import UnsupportedModel

logger = logging.getLogger(__name__)

#: Why a model that only continues what another part has read is none for Tessera.
IS_A_DECODER = (
    "it is the decoder of an encoder-decoder model, made to read what an encoder has read; Tessera serves "
    "models that are a decoder alone"
)
_INCOMPLETE = (
    "which are incomplete, or of a model that was not made to continue text (a classifier, an encoder)"
)
#: Weights named in a message.
_MAX_NAMES = 3


def load_weights(source: str | Path, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in `folder`, on the CPU. source: what it is called. Raises
    `UnsupportedModel`."""
    if _config(folder).get("is_encoder_decoder") is True:
        raise UnsupportedModel(
            f"the base model {source} cannot be served: {IS_A_DECODER}", param="base_model"
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the report names them, and an error would not
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever a configuration or a missing package raises
        raise cannot_load(source, folder, error) from error
    for kind, what in (
        ("mismatched_keys", "have other shapes in its files than config.json gives them"),
        ("missing_keys", f"are not in its files, {_INCOMPLETE}"),
    ):
        names = sorted({key if isinstance(key, str) else key[0] for key in report[kind]})
        if names:
            raise UnsupportedModel(
                f"cannot load the base model {source}: {len(names)} of its weights {what}: {_listed(names)}",
                param="base_model",
            )
    if report["unexpected_keys"]:
        names = sorted(report["unexpected_keys"])
        logger.warning("%d weights of %s belong to no module: %s", len(names), source, _listed(names))
    return model  # type: ignore[no-any-return]


def cannot_load(source: str | Path, folder: Path, error: Exception) -> UnsupportedModel:
    """What to raise where transformers fails on `folder`."""
    return UnsupportedModel(
        f"cannot load the base model {source}: {_reason(folder, error)}", param="base_model"
    )


def _reason(folder: Path, error: Exception) -> str:
    """Why a model does not load.

    safetensors writes files that only their owner can read, and says "no such file" of those it cannot open.
    """
    closed = sorted(path.name for path in folder.iterdir() if not os.access(path, os.R_OK))
    if closed:
        return f"no permission to read {', '.join(closed)} (user id {os.getuid()})"
    if str(error).startswith("Unrecognized configuration class"):  # 200 names of classes follow
        return f"transformers has no causal language model of type {_config(folder).get('model_type')}"
    if isinstance(error, (OSError, ValueError, ImportError)) and str(error):
        return str(error)
    return f"transformers fails on it: {type(error).__name__}: {error}"


def _config(folder: Path) -> dict[str, Any]:
    """config.json, empty where it is none: transformers says what is wrong with it."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + rest
