"""The step of many classifiers: equal to plain torch over transformers' own class, independent of others."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForSequenceClassification

from tessera.errors import CorruptRecord
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis, make_basis
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel
from tests.trainer_worker.conftest import VOCABULARY, MakeRun
from trainer_worker.data.training_data import TrainingData
from trainer_worker.train_loop import TrainerPool
from trainer_worker.training import checkpoint
from trainer_worker.training.classification.data import LabelledData, LabelledRow
from trainer_worker.training.classification.run import ClassificationRun
from trainer_worker.training.classification.trainer import ClassificationTrainer
from trainer_worker.training.plan import ADAM_BETAS, TrainingPlan

WIDTH = 24


def labelled_data(seed: int, num_classes: int, *, num_train: int = 12, num_valid: int = 4) -> LabelledData:
    """Random texts with random classes; 0 classes make a regression."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_train + num_valid):
        length = int(torch.randint(1, 20, (), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        target = torch.randn((), generator=generator).item()
        if num_classes:
            target = float(torch.randint(0, num_classes, (), generator=generator))
        rows.append(LabelledRow(ids, [False] * length, target=target))
    data = TrainingData(tuple(rows[:num_train]), tuple(rows[num_train:]), digest=str(seed))
    labels = tuple(f"class {index}" for index in range(num_classes))
    return LabelledData(data, labels, mean=0.0 if num_classes else 3.0, scale=1.0 if num_classes else 2.0)


def make_run(
    name: str, basis: Basis, num_classes: int = 3, *, trains_bias: bool = False, head_only: bool = False,
    **plan: Any,
) -> ClassificationRun:  # fmt: skip
    fields = {"num_epochs": 1, "batch_size": 4, "total_steps": 9, "learning_rate": 1e-2, "seed": 3}
    return ClassificationRun(
        name,
        labelled_data(sum(map(ord, name)), num_classes),
        TrainingPlan(**{**fields, **plan}),
        basis,
        width=WIDTH,
        head_rate=3e-2,
        head_only=head_only,
        trains_bias=trains_bias,
    )


def finish(trainer: ClassificationTrainer, *runs: ClassificationRun) -> list[Any]:
    updates = []
    while not all(run.is_finished for run in runs):
        updates += trainer.step()
    return updates


def make_trainer(base: BaseModel, basis: Basis, *, max_runs: int = 3) -> ClassificationTrainer:
    return ClassificationTrainer(base, basis, width=WIDTH, max_scores=3, max_runs=max_runs, token_budget=64)


def alone(base: BaseModel, basis: Basis, run: ClassificationRun) -> ClassificationRun:
    trainer = make_trainer(base, basis, max_runs=1)
    trainer.join(run)
    finish(trainer, run)
    assert trainer.leave(run.run_id) is run
    return run


def spanned_by_units(basis: Basis) -> Basis:
    """The same basis, whose R' is the sum of v_ij times the unit matrix E_ij: trained alike."""
    units = torch.eye(basis.rank**2).view(-1, basis.rank, basis.rank)
    groups = list(range(basis.num_modules))
    core = {"kind": "spanned", "num_vectors": len(units), "groups": groups}
    factors = {
        module: (basis.P_in[i].double() @ basis.A[i].double(), basis.B[i].double() @ basis.P_out[i].double())
        for i, module in enumerate(basis.manifest.modules)
    }
    return make_basis(
        model_id=basis.manifest.model_id, method="tinylora", factors=factors, recipe={}, core=core,
        projection=units.expand(basis.num_modules, -1, -1, -1),
    )  # fmt: skip


def test_a_classifier_trains_the_numbers_that_its_basis_says(small: BaseModel, small_basis: Basis) -> None:
    spanned = spanned_by_units(small_basis)
    free, same = (alone(small, basis, make_run("x", basis)) for basis in (small_basis, spanned))
    torch.testing.assert_close(same.R, free.R, rtol=1e-4, atol=1e-6)
    assert free.R[: free.num_core].abs().max() > 1e-3

    few = build_basis(small, rank=4, method="tinylora", num_vectors=13, weight_tying=1.0)
    run = alone(small, few, make_run("x", few))
    assert run.num_core == 13
    assert len(run.R) == 13 + 3 * (WIDTH + 1)
    assert run.R[:13].abs().min() > 0
    adapter = run.to_result(small, {}).adapter
    again = Adapter.from_bytes(adapter.to_bytes(version=1, dtype=torch.float32), cores=few.cores)
    assert again.head is not None
    assert adapter.head is not None
    assert torch.equal(again.head.weight, adapter.head.weight)
    torch.testing.assert_close(again.R, adapter.R, rtol=1e-5, atol=1e-6)
    assert again.trained is not None
    assert again.trained.numel() == 13


class PlainAdapter(nn.Module):
    """y = W x + B P_out R' P_in A x with R' as an ordinary parameter."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.linear, self.A, self.B = linear, A, B
        self.R = nn.Parameter(torch.zeros(A.shape[0], A.shape[0], dtype=A.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + x @ self.A.T @ self.R.T @ self.B.T
        return y


def plain_classifier(small: BaseModel, basis: Basis, num_labels: int) -> tuple[nn.Module, list[PlainAdapter]]:
    """transformers' own class for sequence classification over the same weights, with plain adapters."""
    config = copy.deepcopy(small.model.config)
    config.num_labels, config.pad_token_id = num_labels, None
    model = LlamaForSequenceClassification(config).double().eval()
    model.model.load_state_dict(small.model.model.state_dict())
    model.requires_grad_(False)
    nn.init.zeros_(model.score.weight)
    plain = []
    for i, module in enumerate(basis.manifest.modules):
        parent, _, child = module.name.rpartition(".")
        A = basis.P_in[i].double() @ basis.A[i].double()
        B = basis.B[i].double() @ basis.P_out[i].double()
        adapter = PlainAdapter(model.get_submodule(module.name), A, B)
        setattr(model.get_submodule(parent), child, adapter)
        plain.append(adapter)
    return model, plain


@pytest.mark.parametrize("num_classes", [3, 0])
def test_a_run_equals_plain_torch(small: BaseModel, small_basis: Basis, num_classes: int) -> None:
    """This covers pooling, padding, preconditioner, the scaled head, clipping, schedule and AdamW at once."""
    run = make_run(
        "x", small_basis, num_classes, total_steps=7, warmup_steps=2, max_grad_norm=0.5, weight_decay=0.1,
        patience=None,
    )  # fmt: skip
    model, plain = plain_classifier(small, small_basis, num_classes or 1)
    head = nn.Parameter(torch.zeros(num_classes or 1, WIDTH, dtype=torch.float64))
    scale = run.head_scale
    assert scale == pytest.approx(3.0)

    def loss_of(rows: tuple[LabelledRow, ...] | list[LabelledRow]) -> Tensor:
        del model.score.weight
        model.score.weight = scale * head
        losses = []
        for row in rows:
            scores = model(torch.tensor([row.token_ids]), use_cache=False).logits
            target = torch.tensor([row.target], dtype=torch.float64)
            losses.append(
                F.cross_entropy(scores, target.long()) if num_classes else F.mse_loss(scores[:, 0], target)
            )
        return torch.stack(losses).mean()

    parameters = [*(adapter.R for adapter in plain), head]
    optimizer = torch.optim.AdamW(parameters, betas=ADAM_BETAS, weight_decay=0.1)
    losses = []
    for step in range(7):
        optimizer.zero_grad()
        loss = loss_of(run.data.batch(step, batch_size=4, seed=3))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = run.plan.learning_rate_at(step)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        valid_loss = loss_of(run.data.valid).item()

    trainer = make_trainer(small, small_basis)
    trainer.join(run)
    updates = finish(trainer, run)
    got = [update.train_loss for update in updates if update.train_loss is not None]
    assert got == pytest.approx(losses, abs=1e-9)
    cores, trained_head = run.R[: run.num_core], run.R[run.num_core :].view(-1, WIDTH + 1)
    expected = torch.stack([adapter.R.detach() for adapter in plain])
    torch.testing.assert_close(cores.view(expected.shape), expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(trained_head[:, :-1], head.detach(), atol=1e-9, rtol=1e-9)
    assert not trained_head[:, -1].any(), "transformers' causal classifiers have no bias"
    assert run.progress.valid_loss == pytest.approx(valid_loss, abs=1e-9)


def test_a_user_gets_the_same_alone_and_in_company(small: BaseModel, small_basis: Basis) -> None:
    """The others have other numbers of classes, one is a regression, and one joins in the middle."""
    kinds: dict[str, dict[str, Any]] = {
        "a": {"num_classes": 3},
        "b": {"num_classes": 7, "batch_size": 1, "total_steps": 4},
        "c": {"num_classes": 0, "batch_size": 7, "total_steps": 12},
    }
    expected = {
        name: alone(small, small_basis, make_run(name, small_basis, **k)) for name, k in kinds.items()
    }
    runs = {name: make_run(name, small_basis, **kind) for name, kind in kinds.items()}
    trainer = make_trainer(small, small_basis)
    trainer.join(runs["a"])
    trainer.join(runs["b"])
    for _ in range(3):
        trainer.step()
    trainer.join(runs["c"])
    finish(trainer, *runs.values())
    for name, run in runs.items():
        torch.testing.assert_close(run.R, expected[name].R, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(run.best_R, expected[name].best_R, atol=1e-12, rtol=1e-9)
        assert run.progress.trained_tokens == expected[name].progress.trained_tokens
        assert run.R.any()


def test_the_head_alone_leaves_the_cores_at_zero(small: BaseModel, small_basis: Basis) -> None:
    run = alone(small, small_basis, make_run("x", small_basis, head_only=True))
    assert not run.R[: run.num_core].any()
    assert run.R[run.num_core :].any()
    assert not run.to_result(small, {}).adapter.R.any()


def test_a_bias_is_trained_where_it_is_wanted(small: BaseModel, small_basis: Basis) -> None:
    run = alone(small, small_basis, make_run("x", small_basis, trains_bias=True))
    assert run.R[run.num_core :].view(-1, WIDTH + 1)[:, -1].all()


def test_the_first_step_of_the_head_has_its_own_rate(small: BaseModel, small_basis: Basis) -> None:
    run = make_run("x", small_basis, total_steps=1, warmup_steps=1, patience=None)
    trainer = make_trainer(small, small_basis)
    trainer.join(run)
    finish(trainer, run)
    head = run.to_result(small, {}).adapter.head
    assert head is not None
    assert head.weight[:, :-1].abs().max().item() == pytest.approx(3e-2, rel=1e-4)


def test_sgd_steps_the_head_with_its_own_rate(small: BaseModel, small_basis: Basis) -> None:
    """One step from zero is the rate times the gradient, which is that of a head without any scale."""
    steps = []
    for rate in (1e-2, 3e-2):  # of the cores; the head's is 3e-2 in both
        run = make_run(
            "x", small_basis, learning_rate=rate, optimizer="sgd", total_steps=1, warmup_steps=1,
            max_grad_norm=None, patience=None,
        )  # fmt: skip
        head = alone(small, small_basis, run).to_result(small, {}).adapter.head
        assert head is not None
        steps.append(head.weight)
    torch.testing.assert_close(steps[0], steps[1])


def test_the_last_state_is_published_if_the_job_wants_it(small: BaseModel, small_basis: Basis) -> None:
    run = alone(small, small_basis, make_run("x", small_basis, learning_rate=1.0, publish="last"))
    head = run.to_result(small, {}).adapter.head
    assert head is not None
    expected = run.head_scale * run.R[run.num_core :].view(3, WIDTH + 1)
    torch.testing.assert_close(head.weight, expected.float())
    assert not torch.equal(run.R, run.best_R)


def test_the_result_of_a_regression_is_in_the_units_of_the_data(small: BaseModel, small_basis: Basis) -> None:
    run = alone(small, small_basis, make_run("x", small_basis, 0))
    head = run.to_result(small, {}).adapter.head
    assert head is not None
    assert head.is_regression
    packed = run.head_scale * run.best_R[run.num_core :]
    hidden = torch.randn(5, WIDTH, dtype=torch.float64)
    standard = hidden @ packed[:-1]
    torch.testing.assert_close(head.scores(hidden)[:, 0].double(), 3 + 2 * standard, atol=1e-5, rtol=1e-5)


def test_a_run_with_too_many_classes_does_not_join(small: BaseModel, small_basis: Basis) -> None:
    trainer = make_trainer(small, small_basis)
    assert not trainer.try_join(make_run("x", small_basis, 9))
    assert trainer.try_join(make_run("y", small_basis, 8))
    own = make_run("z", small_basis, 9).make_trainer(small, max_runs=2, token_budget=64)
    assert isinstance(own, ClassificationTrainer)
    assert own.max_scores == 16


def test_a_run_continues_from_its_checkpoint(small: BaseModel, small_basis: Basis) -> None:
    whole = alone(small, small_basis, make_run("x", small_basis))
    run, trainer = make_run("x", small_basis), make_trainer(small, small_basis)
    trainer.join(run)
    for _ in range(4):
        trainer.step()
    saved = checkpoint.to_bytes(run)
    again = make_run("x", small_basis)
    checkpoint.restore(again, saved)
    torch.testing.assert_close(alone(small, small_basis, again).R, whole.R, atol=1e-12, rtol=1e-9)
    other = make_run("x", small_basis, 4)
    assert checkpoint.try_restore(other, saved)
    with pytest.raises(CorruptRecord):
        checkpoint.restore(make_run("x", small_basis), b"nothing")


def test_the_loss_begins_at_the_entropy_of_the_classes(small: BaseModel, small_basis: Basis) -> None:
    run = alone(small, small_basis, make_run("x", small_basis))
    assert run.progress.initial_valid_loss == pytest.approx(math.log(3))


def test_runs_that_write_and_runs_that_classify_have_trainers_of_their_own(
    small: BaseModel, small_basis: Basis, request: pytest.FixtureRequest
) -> None:
    make_writer: MakeRun = request.getfixturevalue("make_run")
    writer, classifier = make_writer("a"), make_run("b", small_basis)
    pool = TrainerPool(small, max_runs=4, token_budget=64)
    pool.join(writer)
    pool.join(classifier)
    pool.join(make_writer("c"))
    pool.join(make_run("d", small_basis))
    tick = pool.tick()
    assert not tick.failures
    assert {update.run_id for update in tick.updates} == {"a", "b", "c", "d"}
    assert len(pool._trainers) == 2
