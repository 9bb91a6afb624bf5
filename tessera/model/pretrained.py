"""Loading the weights of a folder completely, or refusing the folder with a clear reason.

If the files lack weights that config.json requires, transformers only warns and fills them with random
numbers. Half a download, or a config with other sizes, would then be served without an error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tessera.errors import UnsupportedModel
from tessera.model.encoders import find_encoder
from tessera.model.pooling import is_replaced, strip_head

logger = logging.getLogger(__name__)

#: Why the decoder of an encoder-decoder model is refused.
IS_A_DECODER = (
    "it is the decoder of an encoder-decoder model, made to read what an encoder has read; Tessera serves "
    "models that are a decoder alone"
)
_INCOMPLETE = (
    "which are incomplete, or of a model that was not made to continue text (a classifier, an encoder)"
)
#: Number of weights that a message names.
_MAX_NAMES = 3


def load_weights(source: str | Path, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model or the encoder in `folder` onto the CPU. Raises `UnsupportedModel`.

    source: the name of the model in messages.
    """
    encoder = find_encoder(folder)
    if _config(folder).get("is_encoder_decoder") is True:
        raise UnsupportedModel(
            f"the base model {source} cannot be served: {IS_A_DECODER}", param="base_model"
        )
    try:
        auto_class = AutoModelForCausalLM if encoder is None else AutoModelForSequenceClassification
        model, report = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that the report names them, which an error does not
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
        if encoder is not None:
            names = [name for name in names if not is_replaced(name, encoder)]
        if names:
            raise UnsupportedModel(
                f"cannot load the base model {source}: {len(names)} of its weights {what}: {_listed(names)}",
                param="base_model",
            )
    if encoder is not None:
        strip_head(model, encoder, missing=report["missing_keys"])
    if report["unexpected_keys"] and encoder is None:
        names = sorted(report["unexpected_keys"])
        logger.warning(
            "%d weights of %s are ignored, because they belong to no module: %s",
            len(names),
            source,
            _listed(names),
        )
    return model  # type: ignore[no-any-return]


def cannot_load(source: str | Path, folder: Path, error: Exception) -> UnsupportedModel:
    """Make the error to raise after transformers failed to load `folder`."""
    return UnsupportedModel(
        f"cannot load the base model {source}: {_reason(folder, error)}", param="base_model"
    )


def _reason(folder: Path, error: Exception) -> str:
    """Find out why a model does not load.

    safetensors writes files that only their owner can read, and reports "no such file" for one it cannot
    open.
    """
    closed = sorted(path.name for path in folder.iterdir() if not os.access(path, os.R_OK))
    if closed:
        return f"no permission to read {', '.join(closed)} (user id {os.getuid()})"
    if str(error).startswith(
        "Unrecognized configuration class"
    ):  # the message goes on with the names of 200 classes
        return f"transformers has no causal language model of type {_config(folder).get('model_type')}"
    if isinstance(error, (OSError, ValueError, ImportError)) and str(error):
        return str(error)
    return f"transformers fails on it: {type(error).__name__}: {error}"


def _config(folder: Path) -> dict[str, Any]:
    """Read config.json. A broken one counts as empty: transformers then reports what is wrong with it."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + rest
