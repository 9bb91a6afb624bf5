"""Why a model cannot be served, according to its class and configuration, in words for users.

A probe shows what a configuration does not (`forward_pass.install_attention`).
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tessera.model.pretrained import IS_A_DECODER

#: Errors of a probe or a trial that are not caused by the model.
DEVICE_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError)

#: Types of layers (`config.layer_types`) with attention that we can compute.
PAGEABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})

_RECURRENT = (
    "it keeps a recurrent state (Mamba's, a convolution's, linear attention's), which cannot be cut into "
    "blocks of tokens; Tessera serves models whose only state is a KV cache"
)
_NO_CACHE = "it keeps no KV cache of earlier tokens that later ones could read"
_INDEXED = (
    "its sparse attention chooses tokens by an index that has a cache of its own; Tessera serves models "
    "whose only state is a KV cache"
)
_COMPRESSED = (
    "it attends to summaries of earlier tokens, kept in a cache of their own; Tessera serves models whose "
    "only state is a KV cache"
)
_REASONS = {
    "linear_attention": _RECURRENT,
    "hybrid": _RECURRENT,
    "hybrid_sliding": _RECURRENT,
    "conv": _RECURRENT,
    "mamba": _RECURRENT,
    "indexed_attention": _INDEXED,
    "compressed_sparse_attention": _COMPRESSED,
    "heavily_compressed_attention": _COMPRESSED,
}
#: Reasons by `config.model_type`, for models whose layer types and probe give no reason in words for users.
_TYPE_REASONS = {
    "blt": "it cuts text into patches of bytes by itself; Tessera serves models that read tokens",
    "xlnet": _NO_CACHE,
    "xmod": "its layers differ by language and nothing chooses one; it is no causal language model",
}


def find_obstacle(model: PreTrainedModel) -> str:
    """Return why `model` cannot be served, or "" if nothing is known against it."""
    config = model.config.get_text_config()
    if model.config.model_type in _TYPE_REASONS:
        return _TYPE_REASONS[model.config.model_type]
    if hasattr(model.config, "encoder_layers") or hasattr(model.config, "num_encoder_layers"):
        return IS_A_DECODER
    types = set(getattr(config, "layer_types", None) or ())
    for name, reason in _REASONS.items():
        if name in types:
            return reason
    if model._is_stateful and not types:
        return _RECURRENT
    return ""
