"""The catalogue of what proves a method right: every id has a test; and those that no single method owns.

The ids are those of the specification that the methods were built from: G generic, XS LoRA-XS, SB LoRA-SB, DA
LoRA-DA, M LoRAM, L LoLoRA, B the papers' baselines.
"""

from __future__ import annotations

import ast
from pathlib import Path

import peft
import pytest
import torch

from tessera.chat.chat_format import EncodedExample
from tessera.formats.adapter import Adapter
from tessera.methods.bases import METHODS, CalibrationSet, build_basis
from tessera.model.base_model import BaseModel
from tessera.peft.exporting import to_peft
from tests.tessera.methods.matrices import random_matrix, small_model
from tests.tessera.methods.populations import SHORT
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.trainer import CoreRun, Trainer

CATALOGUE = {"g": 9, "xs": 4, "sb": 8, "da": 8, "m": 6, "l": 7, "b": 7}


def test_every_id_of_the_catalogue_has_a_test() -> None:
    words: set[str] = set()
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                words |= set(node.name.split("_"))
    wanted = {f"{letter}{number}" for letter, last in CATALOGUE.items() for number in range(1, last + 1)}
    assert wanted - words == set()


def examples_of(calibration: CalibrationSet) -> tuple[EncodedExample, ...]:
    return tuple(EncodedExample(list(ids), [False, *mask[1:]]) for ids, mask in calibration.examples)


def test_g7_users_in_one_batch_train_as_alone(small: BaseModel, calibration: CalibrationSet) -> None:
    """Stacked cores and one pass for all: what a user becomes does not depend on the others' data."""
    basis = build_basis(small, rank=4)
    examples = examples_of(calibration)

    def trained(*parts: slice) -> torch.Tensor:
        trainer = Trainer(small, basis, max_runs=len(parts), token_budget=512)
        for index, part in enumerate(parts):
            data = TrainingData(examples[part], (), digest=str(index))
            plan = TrainingPlan(1, 2, total_steps=2, learning_rate=1e-2, seed=index)
            trainer.join(CoreRun(str(index), data, plan, basis))
        first = trainer.runs[0]
        while not first.is_finished:
            trainer.step()
        return first.best_R

    alone = trained(slice(0, 4))
    assert float(alone.abs().max()) > 1e-3
    for others in ((slice(4, 8),), (slice(8, 12), slice(4, 8))):
        torch.testing.assert_close(trained(slice(0, 4), *others), alone, atol=1e-6, rtol=1e-4)


def test_b7_dora_and_vera_begin_at_the_base_and_leave_every_basis() -> None:
    """Why neither is offered: what they train beside the factors is a number for each output, not r x r.

    DoRA: W' = m ⊙ (W + B A) / ‖W + B A‖ by rows, m = ‖W‖ at first. VeRA: ΔW = diag(b) B diag(d) A. With B = 0
    or b = 0 both are the base model; a changed m or b moves W out of what frozen factors of rank r can
    express, while VeRA with b = 1 is the r x r form with R = diag(d).
    """
    W, A, B = random_matrix(10, 12, seed=1), random_matrix(3, 12, seed=2), random_matrix(10, 3, seed=3)

    def dora(m: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        moved = W + product
        return m[:, None] * moved / moved.norm(dim=1, keepdim=True)

    def rank(X: torch.Tensor) -> int:
        return int(torch.linalg.matrix_rank(X, atol=1e-9))

    m, b, d = W.norm(dim=1), random_matrix(10, seed=4), random_matrix(3, seed=5)
    torch.testing.assert_close(dora(m, torch.zeros_like(W)), W, atol=1e-12, rtol=0)
    assert rank(dora(1.1 * m + b.abs(), torch.zeros_like(W)) - W) == 10
    vera = b[:, None] * ((B * d) @ A)
    assert float((torch.zeros(10)[:, None] * vera).abs().max()) == 0
    Q = torch.linalg.qr(B)[0]
    assert float((vera - Q @ Q.T @ vera).norm() / vera.norm()) > 0.1, "outside the span of B"
    torch.testing.assert_close((B * d) @ A, B @ torch.diag(d) @ A)


#: PEFT 0.21 still reads a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_peft_gives_an_adapter_of_any_basis_the_same_logits(
    calibration: CalibrationSet, method: str, tmp_path: Path
) -> None:
    """What is exported from a basis of every method is the same function when PEFT loads it."""
    base = small_model()
    needs_data = METHODS[method].needs_calibration != "none"
    options = SHORT if method == "population" else {}
    data = calibration if needs_data else None
    basis = build_basis(base, method=method, rank=4, calibration=data, **options)
    R = 0.5 * random_matrix(basis.num_modules, 4, 4, seed=6, dtype=torch.float32)
    for name, content in to_peft(basis, Adapter(basis.basis_id, R), base_model="small").items():
        (tmp_path / name).write_bytes(content)
    tokens = torch.tensor([[5, 17, 44, 3, 80, 22, 9]])
    before = base.model(tokens).logits
    merged = small_model().model
    for index, module in enumerate(basis.manifest.modules):
        merged.get_submodule(module.name).weight.data += basis.B[index] @ R[index] @ basis.A[index]

    exported = peft.PeftModel.from_pretrained(base.model, tmp_path)

    torch.testing.assert_close(exported(tokens).logits, merged(tokens).logits, atol=2e-4, rtol=1e-4)
    assert float((merged(tokens).logits - before).abs().max()) > 0.05
