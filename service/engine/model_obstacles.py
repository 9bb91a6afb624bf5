"""Why a model cannot be served, told from its class and configuration in words for users.

What no configuration tells, a trial run does (`model_path.adopt`).
"""

from __future__ import annotations

from transformers import PreTrainedModel

from service.engine.attention import NotPageable

#: What a model that cannot be run our way may raise in a trial run: a keyword argument that it does not know,
#: a shape or an attribute that it expects. Not what a device raises.
RECOVERABLE = (
    NotPageable, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError,
    AssertionError,
)  # fmt: skip

#: Types of layers (`config.layer_types`) whose attention is ours to compute.
PAGEABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})

_RECURRENT = (
    "it keeps a recurrent state (such as Mamba's, a convolution's or linear attention's) that cannot be cut into "
    "blocks of tokens; Tessera serves models whose only state is a KV cache"
)
_INDEXED = (
    "its sparse attention chooses tokens by an index that has a cache of its own; Tessera serves models whose "
    "only state is a KV cache"
)
_COMPRESSED = (
    "it attends to summaries of earlier tokens, kept in a cache of their own; Tessera serves models whose only "
    "state is a KV cache"
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


def find_obstacle(model: PreTrainedModel) -> str:
    """Why `model` is out of the question, or "" if nothing is known against it."""
    config = model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ())
    for name, reason in _REASONS.items():
        if name in types:
            return reason
    if model._is_stateful:
        return _RECURRENT
    return ""
