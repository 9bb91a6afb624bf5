"""The linear layers of a base model by name and widths, without its weights.

Processes use this that check requests against a model but never run it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tessera.formats.manifest import ModuleShape
from tessera.model.base_model import linear_layers, make_linear
from tessera.model.encoders import find_encoder
from tessera.model.files import model_folder
from tessera.model.pretrained import cannot_load


def linear_shapes(source: str | Path, *, revision: str | None = None) -> dict[str, ModuleShape]:
    """Return every linear layer that can carry adapters, in model order. Raises `UnsupportedModel`.

    The output head and experts are left out. Adapters are selected by the position of a token in the whole
    batch, and an expert sees only the tokens that are routed to it.

    Nothing is read but the config and no weights are allocated, so this takes as long as making the modules:
    0.2 s for an 8B model.
    """
    folder = model_folder(source, revision=revision)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        is_causal = find_encoder(folder) is None
        auto_class = AutoModelForCausalLM if is_causal else AutoModelForSequenceClassification
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a configuration or a missing package raises
        raise cannot_load(source, folder, error) from error
    make_linear(model)
    return {
        name: ModuleShape(name, module.in_features, module.out_features)
        for name, module in linear_layers(model).items()
        if "experts" not in name.split(".")
    }
