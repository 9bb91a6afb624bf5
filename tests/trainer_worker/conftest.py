"""Shared by the tests of training: a random model small enough for float64, and runs on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.chat.tokenizer import load_tokenizer
from tessera.defaults import BUNDLED_MODEL
from tessera.formats.basis import Basis
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.run import TrainRun
from trainer_worker.training.trainer import CoreRun

DATA = Path(__file__).parents[1] / "data"
VOCABULARY = 97


@pytest.fixture
def small() -> BaseModel:
    """A random Llama of two layers in float64."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    model.requires_grad_(False)
    return BaseModel("small", "small-model", model)


@pytest.fixture
def small_basis(small: BaseModel) -> Basis:
    """LoRA-XS with singular values, so that the preconditioner is not the identity."""
    return build_basis(small, rank=4)


@pytest.fixture(scope="session")
def chat() -> ChatFormat:
    return ChatFormat(load_tokenizer(BUNDLED_MODEL))


def random_examples(seed: int, count: int, *, longest: int = 20) -> tuple[EncodedExample, ...]:
    """Examples with random tokens and lengths, of which about half is learned."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(3, longest, (), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        first = max(1, length // 2)
        examples.append(EncodedExample(ids, [i >= first for i in range(length)]))
    return tuple(examples)


MakeRun = Callable[..., TrainRun]


@pytest.fixture
def make_run(small_basis: Basis) -> MakeRun:
    """Makes runs for the small model, with random data that depend on the run's name."""

    def make(
        run_id: str, *, num_train: int = 12, num_valid: int = 4, basis: Basis = small_basis, **plan: Any
    ) -> TrainRun:
        seed = sum(map(ord, run_id))
        data = TrainingData(
            random_examples(seed, num_train), random_examples(seed + 1, num_valid), digest=run_id
        )
        fields = {"num_epochs": 1, "batch_size": 4, "total_steps": 9, "learning_rate": 1e-2, "seed": 3}
        return CoreRun(run_id, data, TrainingPlan(**{**fields, **plan}), basis)

    return make
