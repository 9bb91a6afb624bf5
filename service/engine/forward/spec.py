"""The specification of one model: the modules of its layers, and what happens between them.

A model is recognised by its class, its configuration and its modules. Nothing is guessed: a model that is not
exactly as expected is refused with the reason, and the generic path serves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from service.engine.attention.reference import AttentionOptions
from service.engine.forward.architectures import ACTIVATION_NAMES, ARCHITECTURES, Architecture
from service.engine.kernels import Norm
from tessera.model.rope import depends_on_batch


class NotFusable(Exception):
    """The fused path cannot run the model. The text is the reason."""


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. Linear layers are given by their dotted names. A norm is None if there is none."""

    #: The linear layers of q, k and v: one for each, or one for all.
    qkv: tuple[str, ...]
    o: str
    #: The linear layers of gate and up: one for each, or one for both.
    gate_up: tuple[str, ...]
    down: str
    #: The norm of every query head, or of all at once (`ModelSpec.has_wide_qk_norms`).
    q_norm: Norm | None
    #: The norm of every key head, or of all at once.
    k_norm: Norm | None
    #: Applied to the output of attention before it is added to the residual.
    post_attention_norm: Norm | None
    #: Applied to the residual before the MLP reads it.
    pre_mlp_norm: Norm | None
    #: Applied to the output of the MLP before it is added to the residual.
    post_mlp_norm: Norm | None
    #: Applied to the residual after the layer: the first norm of the next layer, or the last norm of the
    #: model.
    next_norm: Norm | None
    #: Name of the rotation; None if positions are not rotated.
    rotary: str | None
    attention: AttentionOptions


@dataclass(frozen=True)
class ModelSpec:
    """The whole model."""

    layers: tuple[LayerSpec, ...]
    #: Applied to the residual before the first layer reads it.
    first_norm: Norm | None
    head_dim: int
    activation: str
    #: Whether a norm of queries or keys covers all heads at once.
    has_wide_qk_norms: bool
    #: Factor of the embedding.
    embedding_scale: float
    #: Factor of what a block adds to the residual.
    residual_scale: float
    logit_divisor: float | None
    logit_softcap: float | None

    @property
    def rotaries(self) -> tuple[str, ...]:
        """Names of the rotations in use."""
        return tuple(dict.fromkeys(layer.rotary for layer in self.layers if layer.rotary is not None))


def recognise(model: PreTrainedModel, options: Sequence[AttentionOptions]) -> ModelSpec:
    """Return the spec of `model`. options: the kind of attention of each layer, as a probe has shown it.

    Raises `NotFusable`.
    """
    name = type(model).__name__
    architecture = ARCHITECTURES.get(name)
    if architecture is None or not type(model).__module__.startswith("transformers.models."):
        raise NotFusable(f"{name} is not among the fused architectures")
    try:
        return _Reader(model, architecture).read(options)
    except (AttributeError, KeyError) as error:
        raise NotFusable(f"the modules of {name} are not as expected: {error}") from error


class _Reader:
    """Reads one model's configuration and modules."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self._model = model
        self._config = model.config
        self._architecture = architecture

    def read(self, options: Sequence[AttentionOptions]) -> ModelSpec:
        decoder, config = self._model.get_submodule("model"), self._config
        _require(decoder.training is False, "it is in training mode")
        _require(isinstance(decoder.embed_tokens, nn.Embedding), "its embedding is not torch's")
        head = self._model.get_submodule("lm_head")
        _require(type(head) is nn.Linear and head.bias is None, "its head is not a plain linear layer")
        activation = ACTIVATION_NAMES.get(str(getattr(config, self._architecture.activation)))
        _require(activation is not None, "its activation is unknown")
        assert activation is not None
        architecture = self._architecture
        first_norms = [
            self._optional_norm(f"model.layers.{i}", architecture.pre_attention_norm)
            for i in range(len(options))
        ]
        layers = [
            self._layer(index, next_norm, options[index])
            for index, next_norm in enumerate([*first_norms[1:], self._norm("model.norm")])
        ]
        return ModelSpec(
            layers=tuple(layers),
            first_norm=first_norms[0],
            head_dim=self._head_dim(),
            activation=activation,
            has_wide_qk_norms=architecture.has_wide_qk_norms,
            embedding_scale=self._number(architecture.embedding_scale) or 1.0,
            residual_scale=self._number(architecture.residual_scale) or 1.0,
            logit_divisor=self._number(architecture.logit_divisor),
            logit_softcap=self._number(architecture.logit_softcap),
        )

    def _layer(self, index: int, next_norm: Norm | None, attention: AttentionOptions) -> LayerSpec:
        architecture, prefix = self._architecture, f"model.layers.{index}"
        _require(attention.sinks is None, "it has attention sinks")
        has_qk_norms = hasattr(self._model.get_submodule(f"{prefix}.self_attn"), "q_norm")
        _require(has_qk_norms is architecture.has_qk_norms, "it normalises queries and keys differently")
        return LayerSpec(
            qkv=tuple(self._linear(f"{prefix}.self_attn.{name}") for name in architecture.qkv),
            o=self._linear(f"{prefix}.self_attn.o_proj"),
            gate_up=tuple(self._linear(f"{prefix}.mlp.{name}") for name in architecture.gate_up),
            down=self._linear(f"{prefix}.mlp.down_proj"),
            q_norm=self._norm(f"{prefix}.self_attn.q_norm") if architecture.has_qk_norms else None,
            k_norm=self._norm(f"{prefix}.self_attn.k_norm") if architecture.has_qk_norms else None,
            post_attention_norm=self._optional_norm(prefix, architecture.post_attention_norm),
            pre_mlp_norm=self._optional_norm(prefix, architecture.pre_mlp_norm),
            post_mlp_norm=self._optional_norm(prefix, architecture.post_mlp_norm),
            next_norm=next_norm,
            rotary=self._rotary(index),
            attention=attention,
        )

    def _rotary(self, index: int) -> str | None:
        """Return the rotation of a layer: its layer type if rotations differ by it (Gemma-3), otherwise
        ""."""
        field = self._architecture.rope_layers
        if field is not None and not getattr(self._config, field)[index]:
            return None
        rotary = self._model.get_submodule("model.rotary_emb")
        _require(not depends_on_batch(rotary), "the rotation of its positions depends on the batch")
        return str(self._config.layer_types[index]) if isinstance(rotary.rope_type, dict) else ""

    def _linear(self, name: str) -> str:
        linear = self._model.get_submodule(name)
        _require(isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}")
        return name

    def _optional_norm(self, prefix: str, name: str | None) -> Norm | None:
        return None if name is None else self._norm(f"{prefix}.{name}")

    def _norm(self, name: str) -> Norm:
        module = self._model.get_submodule(name)
        _require(type(module).__name__.endswith("RMSNorm"), f"{name} is a {type(module).__name__}")
        eps: Any = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        _require(eps is not None, f"{name} has no eps")
        weight = module.weight
        assert isinstance(weight, Tensor)
        return Norm(weight.detach(), float(eps), self._architecture.has_offset_norms)

    def _head_dim(self) -> int:
        config = self._config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def _number(self, field: str | None) -> float | None:
        value = None if field is None else getattr(self._config, field)
        return None if value is None else float(value)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotFusable(reason)


def rotary_tables(
    model: PreTrainedModel, names: tuple[str, ...], num_positions: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """cos and sin [num_positions, rotated dims] of each rotation, as the model's own module computes them.

    They have the model's dtype, to which the model rounds them too: 67 MB at 128 Ki positions and head size
    128.
    """
    rotary = model.get_submodule("model.rotary_emb")
    like = torch.empty(0, device=model.device, dtype=model.dtype)
    positions = torch.arange(num_positions, device=model.device)[None]
    tables = {}
    for name in names:
        cos, sin = rotary(like, positions, name) if name else rotary(like, positions)
        tables[name] = (cos[0].contiguous(), sin[0].contiguous())
    return tables
