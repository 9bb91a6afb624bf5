"""transformers' own decode step on the same weights, and its continuous batching of whole requests."""

from __future__ import annotations

import time

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from benchmarks.report import measure


@torch.inference_mode()
def time_forward(model: PreTrainedModel, *, batch: int, context: int, repeats: int) -> list[float]:
    """Seconds of one forward pass of a token per sequence over a dense cache of `context` - 1 tokens: a
    step of padded `generate` without its bookkeeping."""
    config = model.config
    shape = (batch, config.num_key_value_heads, context - 1, config.head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        K, V = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        cache.update(K, V, layer)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    positions = torch.full((batch, 1), context - 1, device=model.device)

    def run() -> None:
        model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)

    return measure(run, repeats=repeats)


def time_continuous_batching(model: PreTrainedModel, prompts: list[list[int]], *, new_tokens: int) -> float:
    """Seconds of `generate_batch` over all prompts, greedy, by a manager that has run once already."""
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    seconds = 0.0
    try:
        for _ in range(2):
            began = time.perf_counter()
            outputs = model.generate_batch(
                inputs=prompts, generation_config=config, progress_bar=False, persistent_manager=True
            )
            seconds = time.perf_counter() - began
            assert all(len(output.generated_tokens) == new_tokens for output in outputs.values())
    finally:
        model.destroy_cached_continuous_batching_manager()
    return seconds
