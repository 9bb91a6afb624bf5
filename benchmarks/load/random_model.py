"""A model directory with random weights, for measuring at a size whose weights are not at hand.

    python -m benchmarks.load.random_model DIR        8B Llama geometry, bfloat16, 16 GB

The tokenizer is the bundled model's. What such a model says is noise; how long it takes is not. It says only
tokens with a text of their own, because a client that waits for text would time the silence of the others.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from service.generation.text import load_text_codec
from tessera.defaults import BUNDLED_MODEL

#: Of the bundled model's directory, what is not the model.
_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--max-positions", type=int, default=8192)
    arguments = parser.parse_args()
    config = LlamaConfig(
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        vocab_size=arguments.vocab,
        max_position_embeddings=arguments.max_positions,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    shutil.copytree(BUNDLED_MODEL, arguments.directory, ignore=shutil.ignore_patterns(*_MODEL_FILES))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(
        "cuda" if torch.cuda.is_available() else "cpu"
    ):  # drawing 8e9 numbers takes a CPU minutes
        model = LlamaForCausalLM(config)
    silence(model, ids_with_text())
    model.save_pretrained(arguments.directory)


def ids_with_text() -> list[int]:
    """Ids of the bundled tokenizer that are text when alone: no control token, no part of a character."""
    codec = load_text_codec(BUNDLED_MODEL)
    return [
        token_id
        for token_id in range(codec.vocab_size)
        if (text := codec.decode([token_id])).isprintable() and text
    ]


@torch.no_grad()
def silence(model: LlamaForCausalLM, audible: list[int]) -> None:
    """Zero the logits of all other tokens: of thousands of random ones the largest is far above zero."""
    is_silent = torch.ones(model.config.vocab_size, dtype=torch.bool)
    is_silent[audible] = False
    model.lm_head.weight[is_silent.to(model.device)] = 0


if __name__ == "__main__":
    main()
