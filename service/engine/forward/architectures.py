"""The differences between the decoder layers of each model family and Llama's, as data.

    y = x + attention(norm(x))      then      y = y + mlp(norm(y))

Names are attributes of transformers' modules and configurations. Knows no tensor. A family is listed only if
an exactness test runs it; the generic path serves everything else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One family. The defaults are Llama's."""

    #: The linear layers of q, k and v: one for each, or one for all.
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    #: The linear layers of gate and up: one for each, or one for both.
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    pre_attention_norm: str | None = "input_layernorm"
    pre_mlp_norm: str | None = "post_attention_layernorm"
    #: Applied to the output of attention before it is added to the residual.
    post_attention_norm: str | None = None
    #: Applied to the output of the MLP before it is added to the residual.
    post_mlp_norm: str | None = None
    #: Whether norms are rms_norm(x) * (1 + w) instead of rms_norm(x) * w.
    has_offset_norms: bool = False
    #: Whether queries and keys are normalised before the rotation.
    has_qk_norms: bool = False
    #: Whether these norms cover all heads at once, and not each head.
    has_wide_qk_norms: bool = False
    #: The configuration field that names the activation.
    activation: str = "hidden_act"
    #: The configuration fields that hold these numbers.
    embedding_scale: str | None = None
    residual_scale: str | None = None
    logit_divisor: str | None = None
    logit_softcap: str | None = None
    #: The configuration field that lists for each layer whether its positions are rotated.
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

#: Keyed by the exact name of transformers' class, because a subclass may behave differently.
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
    # the field is true for layers that do rotate
    "SmolLM3ForCausalLM": Architecture(rope_layers="no_rope_layers"),
}

#: Names of activations in configurations, and their names in the fused op.
ACTIVATION_NAMES = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
