"""Runs that train fewer numbers than R: equal to autograd and torch's AdamW on them, alone and in company."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.formats.adapter import Adapter, holds_trained_numbers
from tessera.formats.basis import Basis
from tessera.methods.bases import build_basis
from tessera.methods.init import make_init
from tessera.model.base_model import BaseModel
from tests.trainer_worker.conftest import MakeRun
from tests.trainer_worker.training.search.test_search_run import make_search
from trainer_worker.training import checkpoint
from trainer_worker.training.run import TrainRun
from trainer_worker.training.search.ladder import MULTIPLES, Ladder
from trainer_worker.training.trainer import CoreRun, Trainer

BASES: dict[str, dict[str, Any]] = {
    "13 numbers": {"method": "tinylora", "num_vectors": 13, "weight_tying": 1.0},
    "some groups": {"method": "tinylora", "num_vectors": 3, "weight_tying": 0.7},
    "a vector each": {"method": "tinylora", "num_vectors": 5},
    "rotations": {"method": "psoft", "scales": "none"},
    "stretched rotations": {"method": "psoft"},
    "neumann": {"method": "psoft", "neumann_terms": 5},
}


def basis_of(small: BaseModel, name: str) -> Basis:
    return build_basis(small, rank=4, **BASES[name])


class PlainCore(nn.Module):
    """y = W x + B R A x, where R is computed from parameters outside of the layer."""

    def __init__(self, linear: nn.Module, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.linear, self.A, self.B = linear, A.double(), B.double()
        self.R: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + x @ self.A.T @ self.R.T @ self.B.T
        return y


def plain_cores(basis: Basis, v: Tensor) -> list[Tensor]:
    """The stored cores, written anew from the papers' formulas, without `tessera.formats.cores`."""
    core, found = basis.manifest.core, []
    for m in range(basis.num_modules):
        if core["kind"] == "spanned":
            assert basis.projection is not None
            mixed = sum(v[0, core["groups"][m], i] * P for i, P in enumerate(basis.projection[m].double()))
            assert isinstance(mixed, Tensor)
        else:
            r = basis.rank
            rows, columns = torch.triu_indices(r, r, 1)
            S = torch.zeros(r, r).double().index_put((rows, columns), v[m, 0, : len(rows)])
            S, identity = S - S.T, torch.eye(r).double()
            mixed = (identity + S) @ torch.linalg.inv(identity - S)
            if core["terms"] == 5:
                mixed = identity + 2 * S + 2 * S @ S + 2 * S @ S @ S + S @ S @ S @ S
            if core["scales"]:
                b, a = v[m, 0, len(rows) :].view(2, r) + 1
                mixed = torch.diag(b) @ mixed @ torch.diag(a)
            mixed = mixed - identity
        found.append(basis.P_out[m].double() @ mixed @ basis.P_in[m].double())
    return found


@pytest.mark.parametrize("name", BASES)
def test_a_run_equals_autograd_and_adamw_on_the_trained_numbers(
    small: BaseModel, make_run: MakeRun, name: str
) -> None:
    """Clipping, decay and moments are those of the few numbers, not of R."""
    basis = basis_of(small, name)
    plan = {"total_steps": 6, "warmup_steps": 2, "max_grad_norm": 0.05, "weight_decay": 0.1, "patience": None}
    run = make_run("x", basis=basis, **plan)
    model, layers = copy.deepcopy(small.model), []
    for module, A, B in zip(basis.manifest.modules, basis.A, basis.B, strict=True):
        parent, _, child = module.name.rpartition(".")
        layers.append(PlainCore(model.get_submodule(module.name), A, B))
        setattr(model.get_submodule(parent), child, layers[-1])
    v = nn.Parameter(torch.zeros(run.R.shape).double())
    optimizer = torch.optim.AdamW([v], weight_decay=0.1)
    losses = []
    for step in range(6):
        for layer, R in zip(layers, plain_cores(basis, v), strict=True):
            layer.R = R
        batch = run.data.batch(step, batch_size=4, seed=3)
        parts = []
        for example in batch:
            ids, learned = torch.tensor(example.token_ids), torch.tensor(example.loss_mask)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            parts.append(F.cross_entropy(logits[:-1][learned[1:]], ids[1:][learned[1:]], reduction="none"))
        loss = torch.cat(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([v], 0.05)
        optimizer.param_groups[0]["lr"] = run.plan.learning_rate_at(step)
        optimizer.step()
        losses.append(loss.item())

    trainer = Trainer(small, basis, max_runs=2, token_budget=512)
    trainer.join(run)  # type: ignore[arg-type]
    got = [update.train_loss for update in finish(trainer, run) if update.train_loss is not None]
    assert got == pytest.approx(losses, abs=1e-9)
    torch.testing.assert_close(run.R, v.detach(), atol=1e-9, rtol=1e-7)
    assert run.R.abs().max() > 1e-3


def finish(trainer: Trainer, *runs: TrainRun) -> list[Any]:
    updates = []
    while not all(run.is_finished for run in runs):
        updates += trainer.step()
    return updates


@pytest.mark.parametrize("name", ["13 numbers", "some groups", "stretched rotations"])
def test_a_user_gets_the_same_alone_and_in_company(small: BaseModel, make_run: MakeRun, name: str) -> None:
    basis = basis_of(small, name)
    expected = {}
    for run_id in "abc":
        expected[run_id] = make_run(run_id, basis=basis)
        trainer = Trainer(small, basis, max_runs=1, token_budget=512)
        trainer.join(expected[run_id])  # type: ignore[arg-type]
        finish(trainer, expected[run_id])
    runs = {run_id: make_run(run_id, basis=basis) for run_id in "abc"}
    together = Trainer(small, basis, max_runs=3, token_budget=64)
    for run in runs.values():
        assert together.try_join(run)
    finish(together, *runs.values())
    for run_id, run in runs.items():
        torch.testing.assert_close(run.R, expected[run_id].R, atol=1e-12, rtol=1e-8)


def test_13_numbers_lower_the_loss_and_are_all_that_is_kept(small: BaseModel, make_run: MakeRun) -> None:
    basis = basis_of(small, "13 numbers")
    run = make_run("x", basis=basis, total_steps=60, learning_rate=0.05, patience=None)
    assert isinstance(run, CoreRun)
    trainer = Trainer(small, basis, max_runs=1, token_budget=512)
    trainer.join(run)
    assert run.R.numel() == run.m.numel() == run.v.numel() == 13
    losses = [u.train_loss for u in finish(trainer, run) if u.train_loss is not None]
    assert sum(losses[-6:]) < sum(losses[:6]) - 0.05
    trainer.leave("x")

    adapter = run.to_result(small, {}).adapter
    blob = adapter.to_bytes(version=1)
    assert holds_trained_numbers(blob)
    assert len(blob) == 128 + len("{}") + 2 * 13
    again = Adapter.from_bytes(blob, cores=basis.cores)
    torch.testing.assert_close(again.R, adapter.R, rtol=0.01, atol=0.02 * float(adapter.R.abs().max()))


@pytest.mark.parametrize("name", ["some groups", "stretched rotations"])
def test_training_goes_on_from_an_adapter_and_from_a_checkpoint(
    small: BaseModel, make_run: MakeRun, name: str
) -> None:
    basis = basis_of(small, name)
    run = make_run("x", basis=basis, total_steps=8, patience=None)
    assert isinstance(run, CoreRun)
    trainer = Trainer(small, basis, max_runs=1, token_budget=512)
    trainer.join(run)
    for _ in range(4):
        trainer.step()
    saved = checkpoint.to_bytes(run)
    finish(trainer, run)
    trainer.leave("x")

    other = make_run("x", basis=basis, total_steps=8, patience=None)
    checkpoint.restore(other, saved)
    trainer.join(other)  # type: ignore[arg-type]
    finish(trainer, other)
    torch.testing.assert_close(other.R, run.R, atol=1e-12, rtol=1e-9)

    adapter = run.to_result(small, {}).adapter
    R0 = make_init(basis, method="warm", adapter=adapter)
    warm = CoreRun("y", run.data, run.plan, basis, start=basis.fold(R0.double()))
    torch.testing.assert_close(basis.cores.expand(warm.R.double()).float(), adapter.R, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["13 numbers", "stretched rotations"])
def test_a_search_finds_their_rate_and_continues_from_its_checkpoint(small: BaseModel, name: str) -> None:
    basis, ladder = basis_of(small, name), Ladder(MULTIPLES, 3)
    run = make_search(basis, ladder, patience=None)
    trainer = run.make_trainer(small, max_runs=1, token_budget=4096)
    for _ in range(4):
        trainer.step()
    other = make_search(basis, ladder, patience=None)
    checkpoint.restore(other, checkpoint.to_bytes(run))
    for each, used in ((run, trainer), (other, other.make_trainer(small, max_runs=1, token_budget=4096))):
        finish(used, each)
    torch.testing.assert_close(other.published_R, run.published_R, atol=1e-9, rtol=0)
    adapter = run.to_result(small, {}).adapter
    assert adapter.trained is not None
    assert adapter.trained.shape == basis.cores.shape
    assert run.published_valid_loss is not None
    assert run.progress.initial_valid_loss is not None
    assert run.published_valid_loss <= run.progress.initial_valid_loss


def test_bases_that_differ_only_in_what_is_trained_are_different_bases(small: BaseModel) -> None:
    made = [basis_of(small, name) for name in BASES]
    made.append(build_basis(small, rank=4, method="pissa"))
    assert len({basis.basis_id for basis in made}) == len(made)
    for basis in made:
        again = Basis.from_bytes(basis.manifest, list(basis.module_bytes()), basis.preconditioner_bytes())
        theta = torch.full(basis.cores.shape, 0.1).double()
        assert torch.equal(again.cores.expand(theta), basis.cores.expand(theta))
