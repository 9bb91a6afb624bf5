"""Refusing base models with quantised weights, which adapters cannot work with.

A basis is made of singular vectors of the weights, a merged model is a sum with them, and the fused path
reads them; all of these need numbers in float32, float16 or bfloat16. transformers keeps quantised weights in
special layers or tensors, some of which look like ordinary ones (torchao, float8). Therefore this module
reads only config.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from tessera.errors import UnsupportedModel

_CONFIG_KEYS = ("quantization_config", "compression_config")
#: Methods for which transformers turns the weights into ordinary ones at load, where it has no kernel for
#: them. A model with an unknown method is loaded as if it were not quantised.
_DEQUANTISED_AT_LOAD = ("fp8", "mxfp4")


def quantisation_of(folder: Path) -> str | None:
    """Return the method by which config.json says that the weights in `folder` are quantised, or None."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        parts = [config, config.get("text_config") or {}]
        found = [part[key] for part in parts for key in _CONFIG_KEYS if part.get(key)]
        return str(found[0].get("quant_method", "by a method without a name")) if found else None
    except (OSError, ValueError, AttributeError):
        return None  # transformers reports what is wrong with the file


def check_before_load(source: str | Path, folder: Path) -> None:
    """Raise `UnsupportedModel` if the weights in `folder` would stay quantised, whatever is installed."""
    method = quantisation_of(folder)
    if method is not None and method not in _DEQUANTISED_AT_LOAD:
        raise _refusal(source, method)


def check_loaded(source: str | Path, folder: Path, model: nn.Module) -> None:
    """Raise `UnsupportedModel` if the weights of the loaded model are still quantised."""
    method = quantisation_of(folder)
    if method is not None and getattr(model, "is_quantized", True):
        raise _refusal(source, method)


def _refusal(source: str | Path, method: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the weights of the base model {source} are quantised ({method[:40]}), and adapters need them in "
        "float32, float16 or bfloat16. Use the model that it was made from, or a copy written with "
        "transformers' model.dequantize() and save_pretrained(), if its method supports that",
        param="base_model",
    )
