"""Random matrices, a small random Llama, and a method's view of one module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tessera.formats.manifest import ModuleShape
from tessera.methods.bases import METHODS, CalibrationSet
from tessera.methods.building.activations import InputRule
from tessera.methods.building.collected import Counts, Statistics
from tessera.methods.building.decomposition import Decomposition
from tessera.methods.building.method import ModuleData, ModuleFactors
from tessera.methods.options import fill_options
from tessera.model.base_model import BaseModel

VOCABULARY = 97


def random_matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random_matrix(rows, columns, seed=seed))[0]


def decaying_matrix(d_out: int, d_in: int, *, power: float = 0.5, seed: int = 0) -> Tensor:
    """A matrix with singular values k^-power, like those of trained weights."""
    k = min(d_out, d_in)
    values = torch.arange(1, k + 1, dtype=torch.float64) ** -power
    return orthonormal(d_out, k, seed=seed) * values @ orthonormal(d_in, k, seed=seed + 1).T


def svd_rank(X: Tensor, rank: int) -> Tensor:
    """The best approximation of X of this rank (Eckart and Young)."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def chordal(A: Tensor, B: Tensor) -> float:
    """(Σ sin² θ_i)^½ over the principal angles of the row spaces of A and B [r, n]; at most √r."""
    P, Q = (torch.linalg.qr(X.double().T)[0] for X in (A, B))
    return float(torch.linalg.matrix_norm(P @ P.T - Q @ Q.T)) / 2**0.5


def module_data(
    weight: Tensor,
    rank: int,
    *,
    gradient: Tensor | None = None,
    inputs: InputRule | None = None,
    outputs: Tensor | None = None,
    counts: Counts | None = None,
    seed: int = 0,
) -> ModuleData:
    counts = counts or Counts(1, 100, 100, 1, 100)
    statistics = Statistics(counts, gradient, inputs, outputs)
    shape = ModuleShape("layer", weight.shape[1], weight.shape[0])
    return ModuleData(shape, weight, rank, seed, statistics, Decomposition())


def factorise(method: str, data: ModuleData, **options: object) -> ModuleFactors:
    """One module by a method of the registry, its options filled in and checked as `build_basis` does."""
    chosen = METHODS[method]
    return chosen.factorise(data, fill_options(method, chosen.options, options))


def small_model(
    *, num_layers: int = 2, dtype: torch.dtype = torch.float32, hidden: int = 32, seed: int = 0
) -> BaseModel:
    """A random Llama; its weights are larger than usual, so that its layers do something."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    return BaseModel("small", f"{seed:02d}" * 32, model)


def small_calibration(
    num_examples: int = 12, *, seed: int = 0, lengths: Sequence[int] = (9, 14, 20, 27)
) -> CalibrationSet:
    """Random tokens; the second half of every example is to be learned."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(num_examples):
        length = lengths[index % len(lengths)]
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        examples.append((tuple(ids), tuple(position >= length // 2 for position in range(length))))
    return CalibrationSet(tuple(examples))


def text_of(calibration: CalibrationSet) -> CalibrationSet:
    """The same tokens without labels."""
    return CalibrationSet.from_texts([token_ids for token_ids, _ in calibration.examples])
