"""A tiny random model of every causal architecture that transformers ships.

One set of sizes serves most configurations, because their fields share names; `_OVERRIDES` says where a type
needs others. Vectors (norms, biases) are randomised, so that one which is left out or applied twice shows.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 211
#: Shorter than the longer prompts of the sweep, so that a window which is ignored, or off by one, shows.
WINDOW = 11
#: A configuration whose fields have other names would build a model of full size.
MAX_PARAMETERS = 40_000_000

#: Heads that continue an encoder's output in another modality, and take more than token ids.
_NOT_TEXT = {"trocr", "musicgen", "musicgen_melody", "git", "whisper", "beam"}

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # at the usual 0.02 every logit is nearly the same
    "tie_word_embeddings": False,  # tied, random models repeat their input
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 80,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
#: Sizes of a model's other towers (vision, audio), which no text request reaches.
_OTHER_TOWERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "depth": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
#: Multi-head latent attention.
_LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": ...,
}
_INDEXED: dict[str, Any] = {**_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_SLIDING_THEN_FULL = ["sliding_attention"] * 3 + ["full_attention"]
_GEMMA_4: dict[str, Any] = {
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
    "layer_types": _SLIDING_THEN_FULL,
    "enable_moe_block": False,
}
_QWEN_4: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 500,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_WITH_END: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
_OLD_NAMES: dict[str, Any] = {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 256}
_SMALL_BART: dict[str, Any] = {
    "d_model": 64,
    "decoder_layers": 4,
    "encoder_layers": 1,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 80,
    "encoder_ffn_dim": 80,
}

#: What a type needs beside or instead of `_SIZES`; "..." leaves a field at its default.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bart": _SMALL_BART,
    "blenderbot": _SMALL_BART,
    "blenderbot-small": _SMALL_BART,
    "bigbird_pegasus": _SMALL_BART,
    "bloom": {"n_layer": 4, "n_head": 4},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "codegen": {"rotary_dim": 8, "n_inner": 80},
    "cohere2": {"layer_types": _SLIDING_THEN_FULL},
    "cohere_compass_text": {
        "layer_types": _SLIDING_THEN_FULL,
        "rope_parameters": dict.fromkeys(set(_SLIDING_THEN_FULL), _ROPE),
    },
    "ctrl": {"n_embd": 64, "dff": 80, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "cwm": {**_WITH_END, "pad_token_id": 3},
    "dbrx": {
        **_OLD_NAMES,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _INDEXED,
    "dots3_note_text": {
        **_INDEXED,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "mlp_layer_types": ["dense", *["sparse"] * 3],
        "shared_experts_intermediate_size": 32,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
    },
    "emu3": _WITH_END,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "exaone4": {"sliding_window_pattern": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": ...},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gemma3n_text": {
        "query_pre_attn_scalar": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 1,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4": _GEMMA_4,
    "gemma4_text": _GEMMA_4,
    "gemma4_unified": _GEMMA_4,
    "gemma4_unified_text": _GEMMA_4,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _INDEXED,
    "gpt2": {"n_inner": 80},
    "gpt_bigcode": {"n_inner": 80},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW, "num_layers": 4},
    "gpt_neox": {"rotary_pct": 0.5},
    "gptj": {"rotary_dim": 8, "n_inner": 80},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["attention"] * 4,
        "shared_intermediate_size": 32,
    },
    "hunyuan_v1_moe": {"moe_topk": 2, "num_shared_expert": 1},
    "jamba": {"mamba_d_state": 8, "use_mamba_kernels": False},
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 2},
    "kimi_linear": _LATENT,
    "lfm2": {"full_attn_idxs": [0, 1, 2, 3]},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4},
    "llama4": {"intermediate_size_mlp": 80, "attention_chunk_size": 16},
    "llama4_text": {"intermediate_size_mlp": 80, "attention_chunk_size": 16},
    "longcat_flash": {
        **_LATENT,
        "head_dim": 8,
        "num_layers": 2,
        "num_hidden_layers": ...,
        "zero_expert_num": 1,
    },
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "marian": _SMALL_BART,
    "mbart": _SMALL_BART,
    "minicpm3": _LATENT,
    "mllama": {**_WITH_END, "cross_attention_layers": []},
    "modernbert-decoder": {**_WITH_END, "local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2},
    "mpt": _OLD_NAMES,
    "mvp": _SMALL_BART,
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "openai-gpt": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 64},
    "pegasus": _SMALL_BART,
    "persimmon": {"num_key_value_heads": 4},
    "plbart": _SMALL_BART,
    "olmoe": {"sliding_window": None},  # handed to attention, but in no mask: no released OLMoE has one
    "prophetnet": {"num_hidden_layers": ..., "num_decoder_layers": 2, "num_encoder_layers": 1},
    "qwen4_exp": _QWEN_4,
    "qwen4_exp_text": _QWEN_4,
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": WINDOW},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "stablelm": {"partial_rotary_factor": 0.5},
    "vaultgemma": {"query_pre_attn_scalar": 16},
    "xglm": {"d_model": 64, "num_layers": 4, "attention_heads": 4, "ffn_dim": 80},
    "xlnet": {"max_position_embeddings": ..., "d_model": 64, "n_layer": 4, "n_head": 4, "d_inner": 80},
    "youtu": _LATENT,
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "layer_types": ["linear_attention", "hybrid"] * 3,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "moe_topk": 1},
}
#: Their nested configurations take no sizes from outside.
_FLAT = {"dbrx", "moshi"}


def model_types() -> list[str]:
    """Every type with a causal head that takes text."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - _NOT_TEXT)


def make_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """The tiny configuration of a type, with `fields` on top."""
    wanted = {**_SIZES, **_OVERRIDES.get(model_type, {}), **fields}
    wanted = {name: value for name, value in wanted.items() if value is not ...}
    towers = getattr(CONFIG_MAPPING[model_type], "sub_configs", {})
    nested = {name: wanted if name == "text_config" else _OTHER_TOWERS for name in towers}
    return AutoConfig.for_model(model_type, **wanted, **({} if model_type in _FLAT else nested))


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model in float32. Raises `ValueError` if the configuration is not a tiny one, and whatever
    transformers raises."""
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"{num_parameters / 1e6:.0f} million parameters: its sizes have other names")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        is_a_state = any(part in name for part in ("A_log", "dt_bias", "sink"))
        if parameter.ndim == 1 and not is_a_state:
            parameter.data += 0.3 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if "e_score_correction" in name:
            buffer.data += 0.1 * torch.randn_like(buffer)
    model.requires_grad_(False)
    return model
