"""The frozen base model: loading it, its digest, and finding and replacing its target modules.

The model classes of transformers are used unmodified. This module knows nothing of adapters, Redis or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from tessera.defaults import LLAMA_LINEARS
from tessera.errors import InvalidInput, UnsupportedModel
from tessera.model import quantised
from tessera.model.encoders import ENCODERS, Encoder
from tessera.model.files import model_digest, model_folder, model_name
from tessera.model.pooling import encoder_of
from tessera.model.pretrained import load_weights
from tessera.model.rope import pin_rotations
from tessera.model.target_modules import check_patterns, choose_targets, is_named

#: Parts of names that mark output heads. These see only the positions that are sampled, and are often tied to
#: the embeddings.
_HEADS = {"lm_head", "embed_out", "cls", "pred_layer"}
#: Words in the names of modules that process no text.
_TOWERS = {"vision", "visual", "image", "audio", "speech"}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: Names of the longest sequence in configurations, and the value if there is none (as in Bloom).
_MAX_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_DEFAULT_MAX_POSITION = 2048


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model. All its linear layers are `torch.nn.Linear` (see `make_linear`)."""

    name: str
    #: `model_digest` of its files, by which bases refer to it.
    model_id: str
    model: PreTrainedModel
    #: The longest text that is served and trained, in tokens; None: as long as the model takes.
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        make_linear(self.model)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def encoder(self) -> Encoder | None:
        """Return what is known about the encoder, None for a causal model."""
        return encoder_of(self.model)

    @property
    def max_position(self) -> int:
        """Return the longest sequence, in tokens, that the model was made for and is used for."""
        return longest_sequence(self.model.config, self.max_model_len)


def longest_sequence(config: Any, max_model_len: int | None) -> int:
    """Return the longest sequence, in tokens, that a model of this configuration was made for.

    max_model_len: a smaller limit; None: no other limit.
    """
    text_config = config.get_text_config()
    names = (name for name in _MAX_POSITION_FIELDS if getattr(text_config, name, None))
    longest = int(getattr(text_config, next(names, ""), _DEFAULT_MAX_POSITION))
    encoder = ENCODERS.get(str(getattr(config, "model_type", "")))
    if encoder is not None and encoder.is_offset and not getattr(config, "is_decoder", False):
        longest -= int(config.pad_token_id) + 1
    return min(longest, max_model_len or longest)


def load_base_model(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
) -> BaseModel:
    """Load frozen weights from a directory or a hub id, and choose its rotations (`rope.py`).

    device: "auto" means CUDA if there is a GPU. dtype: "auto" means bfloat16 on CUDA, and float32 on a CPU,
    where half precision is slower and float32 gives the reference results. Raises `UnsupportedModel`.
    """
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device)
    folder = model_folder(source, revision=revision)
    quantised.check_before_load(source, folder)
    transformers_logging.disable_progress_bar()  # a progress bar would litter the log
    with ThreadPoolExecutor(1) as beside:  # hashing 16 GB in one file takes 12 s
        digest = beside.submit(model_digest, folder)
        model = load_weights(source, folder, torch_dtype)
        quantised.check_loaded(source, folder, model)
        if model.dtype != torch_dtype:  # transformers chooses the dtype when it dequantises
            model.to(torch_dtype)
        model.requires_grad_(False)
        model.eval()
        model.to(device)
        base = BaseModel(model_name(source), digest.result(), model, max_model_len)
        pin_rotations(model, base.max_position)
        return base


def resolve_device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the dtype of this name. Raises `InvalidInput` if it is not a floating-point dtype."""
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if dtype not in DTYPES:
        raise InvalidInput(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}", param="dtype")
    return DTYPES[dtype]


def iter_target_modules(
    model: nn.Module, patterns: Sequence[str] = LLAMA_LINEARS
) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers to adapt, in model order, as (dotted name, module). See `choose_targets`.

    Raises `UnsupportedModel`, with the candidates, if nothing matches; and also for a matching layer with a
    weight that is quantised or not two-dimensional. Because one list may serve several architectures, single
    patterns may match nothing. `check_patterns` checks the patterns that a user gives.
    """
    linears = linear_layers(model)
    exact = [pattern for pattern in patterns if not set(pattern) & set("*?[")]
    chosen = set(choose_targets(list(linears), patterns))
    for name, module in model.named_modules():
        if name not in chosen and (is_plain_linear(module) or not is_named(name, patterns)):
            continue
        if not hasattr(module, "weight") or _HEADS & set(name.split(".")):
            continue
        if _is_no_matrix(module) and not is_named(name, exact):
            continue  # a norm or an embedding, which a wildcard does not mean
        if not is_plain_linear(module) or not module.weight.is_floating_point():
            raise UnsupportedModel(
                f"target module {name} is a {type(module).__name__} with {module.weight.dtype} weights; "
                "adapters need a torch.nn.Linear with floating-point weights",
                param="target_modules",
            )
        yield name, module
    if not chosen:
        check_patterns(list(linears), patterns)


def _is_no_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or getattr(module.weight, "ndim", 2) != 2


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that process text, except the output head, by dotted name in model order."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    encoder = encoder_of(model)
    found = {}
    for name, module in model.named_modules():
        parts = set(name.split("."))
        if encoder is not None and parts & set(encoder.outside):
            continue
        words = {word for part in parts for word in part.split("_")}
        if is_plain_linear(module) and module is not head and not (parts & _HEADS or words & _TOWERS):
            found[name] = module
    return found


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module only multiplies. Some routers of transformers are linear by class only."""
    return isinstance(module, nn.Linear) and "Router" not in type(module).__name__


def make_linear(model: nn.Module) -> None:
    """Replace every `Conv1D` of transformers by an equal `torch.nn.Linear` over the same memory.

    `Conv1D` is GPT-2's kind of linear layer, with a weight [d_in, d_out]. Without it, all target modules are
    alike.
    """
    for name in [name for name, module in model.named_modules() if isinstance(module, Conv1D)]:
        replace_module(model, name, _linear_of)


def _linear_of(conv: nn.Module) -> nn.Linear:
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    d_in, d_out = weight.shape
    linear = nn.Linear(d_in, d_out, device="meta")
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    linear.bias = bias
    return linear.train(conv.training)


def replace_module(model: nn.Module, name: str, make: Callable[[Any], nn.Module]) -> nn.Module:
    """Replace the module called `name` by `make(old module)`, and return the new module."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    new = make(getattr(parent, child))
    setattr(parent, child, new)
    return new
