"""What the decoder layers of each family do, as data: where they differ from Llama's.

    y = x + attention(norm(x))      then      y = y + mlp(norm(y))

Names are attributes of transformers' modules and configurations. Knows no tensor. A family is listed only if
an exactness test runs it; everything else is served by the generic path.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One family. The defaults are Llama's.

    qkv, gate_up: the linear layers, one each or all in one. post_attention_norm, post_mlp_norm: applied to a
    block's output before it is added to the residual. has_offset_norms: rms_norm(x) * (1 + w) in the place of
    rms_norm(x) * w. has_qk_norms: of every head's query and key, before the rotation; has_wide_qk_norms: of
    all heads' queries, and keys, at once. embedding_scale, residual_scale, logit_divisor, logit_softcap:
    configuration fields that hold these numbers. rope_layers: the field that says, layer by layer, whether
    positions are rotated.
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    pre_attention_norm: str | None = "input_layernorm"
    pre_mlp_norm: str | None = "post_attention_layernorm"
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    has_offset_norms: bool = False
    has_qk_norms: bool = False
    has_wide_qk_norms: bool = False
    activation: str = "hidden_act"
    embedding_scale: str | None = None
    residual_scale: str | None = None
    logit_divisor: str | None = None
    logit_softcap: str | None = None
    rope_layers: str | None = None


_LLAMA = Architecture()
_GEMMA_2 = Architecture(
    pre_mlp_norm="pre_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
    has_offset_norms=True,
    activation="hidden_activation",
    logit_softcap="final_logit_softcapping",
)

#: By the exact name of transformers' class. A subclass of it may do anything.
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": Architecture(has_qk_norms=True),
    "Phi3ForCausalLM": Architecture(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "GemmaForCausalLM": Architecture(has_offset_norms=True),
    "Gemma2ForCausalLM": _GEMMA_2,
    "Gemma3ForCausalLM": Architecture(**{**_GEMMA_2.__dict__, "has_qk_norms": True}),
    "GraniteForCausalLM": Architecture(
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    "Olmo2ForCausalLM": Architecture(
        pre_attention_norm=None,
        pre_mlp_norm=None,
        post_attention_norm="post_attention_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
        has_qk_norms=True,
        has_wide_qk_norms=True,
    ),
    "SmolLM3ForCausalLM": Architecture(rope_layers="no_rope_layers"),  # true where it does rotate
}

#: Names of activations in configurations, and what the fused op calls them.
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
