"""Pairs in the shared step: equal to plain torch, independent of the runs beside them, reference kept."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tessera.chat.chat_format import EncodedExample
from tessera.errors import Conflict, CorruptRecord
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tests.trainer_worker.conftest import VOCABULARY, MakeRun, random_examples
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training import checkpoint
from trainer_worker.training.lora.factors import initial_factors
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer
from trainer_worker.training.objectives.preference import Preference
from trainer_worker.training.plan import ADAM_BETAS, TrainingPlan
from trainer_worker.training.run import RunUpdate, TrainRun
from trainer_worker.training.trainer import CoreRun, Trainer

PLAN = {"num_epochs": 2, "batch_size": 4, "total_steps": 6, "learning_rate": 1e-2, "seed": 3}


def pair_data(name: str, *, num_train: int = 12, num_valid: int = 4) -> TrainingData:
    """Random pairs whose answers begin alike; every third preferred answer has two rows."""
    seed = sum(map(ord, name))
    rows, sizes, chosen = [], [], []
    for number, first in enumerate(random_examples(seed, num_train + num_valid)):
        prompt = first.loss_mask.index(True)
        more = random_examples(1000 * seed + number, 2)
        other = [*first.token_ids[:prompt], *more[0].token_ids]
        extra = [more[1]] if number % 3 == 0 else []
        rows += [first, *extra, EncodedExample(other, [i >= prompt for i in range(len(other))])]
        sizes.append(2 + len(extra))
        chosen.append(1 + len(extra))
    split = sum(sizes[:num_train])
    return TrainingData(
        tuple(rows[:split]), tuple(rows[split:]), digest=name,
        train_sizes=tuple(sizes[:num_train]), valid_sizes=tuple(sizes[num_train:]),
        train_chosen=tuple(chosen[:num_train]), valid_chosen=tuple(chosen[num_train:]),
    )  # fmt: skip


def pair_run(
    name: str,
    basis: Basis,
    objective: Preference | None = None,
    start: Tensor | None = None,
    *,
    num_train: int = 12,
    **plan: Any,
) -> CoreRun:
    return CoreRun(
        name, pair_data(name, num_train=num_train), TrainingPlan(**{**PLAN, **plan}), basis,
        objective=objective or Preference(), start=start, refers_to_base=start is None,
    )  # fmt: skip


def finish(trainer: Trainer | LoraTrainer, *runs: TrainRun) -> list[RunUpdate]:
    updates = []
    while not all(run.is_finished for run in runs):
        updates += trainer.step()
    return updates


def alone(base: BaseModel, basis: Basis, run: CoreRun, *, token_budget: int = 512) -> CoreRun:
    trainer = Trainer(base, basis, max_runs=1, token_budget=token_budget)
    trainer.join(run)
    finish(trainer, run)
    trainer.leave(run.run_id)
    return run


class PlainAdapter(nn.Module):
    """y = W x + B P_out R' P_in A x with R' as an ordinary parameter."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, R: Tensor) -> None:
        super().__init__()
        self.linear, self.A, self.B, self.R = linear, A, B, nn.Parameter(R.clone())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + x @ self.A.T @ self.R.T @ self.B.T
        return y


def plain_model(base: BaseModel, basis: Basis, R: Tensor) -> tuple[PreTrainedModel, list[nn.Parameter]]:
    model, parameters = copy.deepcopy(base.model), []
    for i, module in enumerate(basis.manifest.modules):
        parent, _, child = module.name.rpartition(".")
        A = basis.P_in[i].double() @ basis.A[i].double()
        B = basis.B[i].double() @ basis.P_out[i].double()
        adapter = PlainAdapter(model.get_submodule(module.name), A, B, R[i].double())
        setattr(model.get_submodule(parent), child, adapter)
        parameters.append(adapter.R)
    return model, parameters


def answer_logp(model: PreTrainedModel, rows: Sequence[EncodedExample]) -> tuple[Tensor, int]:
    """Log-probability of the learned tokens of the rows, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, learned = torch.tensor(row.token_ids), torch.tensor(row.loss_mask)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total - F.cross_entropy(logits[:-1][learned[1:]], ids[1:][learned[1:]], reduction="sum")
        count += int(learned.sum())
    return total, count


def plain_losses(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    objective: Preference,
    examples: Sequence[tuple[tuple[EncodedExample, ...], int]],
) -> Tensor:
    """The loss of each pair, straight from the formula and without padding."""
    losses = []
    for rows, first in examples:
        gains, means = [], []
        for side in (rows[:first], rows[first:]):
            logp, count = answer_logp(model, side)
            with torch.no_grad():
                before, _ = answer_logp(reference, side)
            gains.append(logp - (0 if objective.reference_free else before))
            means.append(gains[-1] / count)
        z = objective.beta * (gains[0] - gains[1])
        smoothing = objective.label_smoothing
        if objective.loss_type == "sigmoid":
            losses.append(-(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z))
        elif objective.loss_type == "hinge":
            losses.append(torch.relu(1 - z))
        elif objective.loss_type == "ipo":
            losses.append((means[0] - means[1] - 1 / (2 * objective.beta)) ** 2)
        else:
            losses.append(-F.logsigmoid(objective.beta * (means[0] - means[1])))
    return torch.stack(losses)


OBJECTIVES = [
    Preference(),
    Preference(beta=0.5, label_smoothing=0.1),
    Preference(loss_type="hinge"),
    Preference(loss_type="ipo"),
    Preference(beta=2.0, loss_type="sigmoid_norm"),
    Preference(reference_free=True),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.loss_type}-{o.label_smoothing}")
@pytest.mark.parametrize("continues", [False, True])
def test_a_run_equals_plain_torch(
    small: BaseModel, small_basis: Basis, objective: Preference, continues: bool
) -> None:
    """Covers reference, pairs in one pass, padding, loss, gradient, clipping, schedule, AdamW, validation."""
    start = None
    if continues:
        start = 0.1 * torch.randn(len(small_basis.A), 4, 4, generator=torch.Generator().manual_seed(2))
    run = pair_run("x", small_basis, objective, start, weight_decay=0.1, max_grad_norm=0.5, patience=None)
    reference, _ = plain_model(small, small_basis, run.R)
    model, parameters = plain_model(small, small_basis, run.R)
    optimizer = torch.optim.AdamW(parameters, betas=ADAM_BETAS, weight_decay=0.1)
    data, losses = run.data, []
    for step in range(6):
        optimizer.zero_grad()
        indices = data.batch_indices(step, batch_size=4, seed=3)
        batch = [(data.train_examples[i], data.train_chosen[i]) for i in indices]
        loss = plain_losses(model, reference, objective, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = run.plan.learning_rate_at(step)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        held_out = list(zip(data.valid_examples, data.valid_chosen, strict=True))
        valid_loss = plain_losses(model, reference, objective, held_out).mean().item()

    trainer = Trainer(small, small_basis, max_runs=2, token_budget=64)
    trainer.join(run)
    updates = finish(trainer, run)
    got = [update.train_loss for update in updates if update.train_loss is not None]
    assert got == pytest.approx(losses, abs=1e-9)
    torch.testing.assert_close(run.R, torch.stack([p.detach() for p in parameters]), atol=1e-8, rtol=1e-8)
    assert run.progress.valid_loss == pytest.approx(valid_loss, abs=1e-9)


def test_pairs_and_other_runs_share_a_step_and_change_nothing_for_each_other(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    """Two runs with pairs and different losses, two supervised ones; one of each joins in the middle."""

    def make() -> dict[str, CoreRun]:
        runs = {
            "pairs": pair_run("pairs", small_basis),
            "late pairs": pair_run("late pairs", small_basis, Preference(0.4, "ipo"), batch_size=3),
            "answers": make_run("answers", batch_size=3, total_steps=12),
            "late answers": make_run("late answers", total_steps=5),
        }
        assert all(isinstance(run, CoreRun) for run in runs.values())
        return runs  # type: ignore[return-value]

    expected = {name: alone(small, small_basis, run, token_budget=4096) for name, run in make().items()}
    runs = make()
    trainer = Trainer(small, small_basis, max_runs=4, token_budget=100)
    trainer.join(runs["pairs"])
    trainer.join(runs["answers"])
    for _ in range(5):
        trainer.step()
    trainer.join(runs["late pairs"])
    trainer.join(runs["late answers"])
    finish(trainer, *runs.values())
    for name, run in runs.items():
        torch.testing.assert_close(run.R, expected[name].R, atol=1e-11, rtol=1e-9)
        torch.testing.assert_close(run.best_R, expected[name].best_R, atol=1e-11, rtol=1e-9)
        assert run.progress.best_valid_loss == pytest.approx(
            expected[name].progress.best_valid_loss, abs=1e-10
        )
        assert run.progress.trained_tokens == expected[name].progress.trained_tokens


def test_what_others_prefer_changes_not_one_bit(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    results = []
    for shift in (0, 1):
        mine, pairs, other = make_run("a"), pair_run("b", small_basis), pair_run("c", small_basis)
        moved = [
            dataclasses.replace(row, token_ids=[(token + shift) % VOCABULARY for token in row.token_ids])
            for row in other.data.train
        ]
        data = dataclasses.replace(other.data, train=tuple(moved), digest="moved")
        other = CoreRun("c", data, other.plan, small_basis, objective=Preference())
        trainer = Trainer(small, small_basis, max_runs=3, token_budget=512)
        for run in (mine, pairs, other):
            assert isinstance(run, CoreRun)
            trainer.join(run)
        finish(trainer, mine, pairs, other)
        results.append((mine.R, pairs.R, other.R))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][2], results[1][2])


def test_the_reference_is_computed_once_in_bounded_steps_while_others_train(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    run, other = pair_run("x", small_basis, num_train=40), make_run("other", total_steps=30, patience=None)
    assert isinstance(other, CoreRun)
    trainer = Trainer(small, small_basis, max_runs=2, token_budget=512)
    trainer.join(run)
    trainer.join(other)
    seen = []
    while run.awaits_reference:
        before, steps = trainer.tokens, other.progress.step
        mine = [update for update in trainer.step() if update.run_id == "x"]
        assert other.progress.step == steps + 1, "others go on"
        assert len(mine) == 1
        assert mine[0].reference_progress is not None
        assert run.progress.step == 0
        seen.append(mine[0].reference_progress[0])
        longest = max(sum(len(row.token_ids) for row in rows) for rows in run.data.train_examples)
        if len(seen) > 1:  # the first step also evaluates the other run
            assert (trainer.tokens - before).eval <= 3 * run.tokens_per_step + longest + 4 * 20
    assert len(seen) > 2
    assert seen == sorted(set(seen))
    assert seen[-1] == run.data.num_train + run.data.num_valid
    finish(trainer, run)
    assert run.references is not None
    kept = run.references.logps
    for pair, (rows, first) in enumerate(zip(run.data.train_examples, run.data.train_chosen, strict=True)):
        expected = [answer_logp(small.model, side)[0].item() for side in (rows[:first], rows[first:])]
        assert kept[pair].tolist() == pytest.approx(expected, abs=1e-9)


def test_an_update_carries_the_names_of_trl(small: BaseModel, small_basis: Basis) -> None:
    run = pair_run("x", small_basis, total_steps=24, learning_rate=0.05, patience=None)
    trainer = Trainer(small, small_basis, max_runs=1, token_budget=512)
    trainer.join(run)
    updates = finish(trainer, run)
    names = ("chosen", "rejected", "accuracies", "margins")
    trained = [update for update in updates if update.train_loss is not None]
    evaluated = [update for update in updates if update.valid_loss is not None]
    assert all(update.details.keys() == {f"rewards/{name}" for name in names} for update in trained)
    assert all(update.details.keys() == {f"eval_rewards/{name}" for name in names} for update in evaluated)
    for update in trained:
        margin = update.details["rewards/chosen"] - update.details["rewards/rejected"]
        assert update.details["rewards/margins"] == pytest.approx(margin, abs=1e-12)
        assert update.train_accuracy == update.details["rewards/accuracies"]
    assert trained[-1].details["rewards/margins"] > trained[0].details["rewards/margins"]


@pytest.mark.parametrize("stop_after", [1, 2, 5, 9])
def test_an_interrupted_run_gives_the_same_bits(
    small: BaseModel, small_basis: Basis, stop_after: int
) -> None:
    """Whether it is interrupted while the reference is computed or later, from an adapter that is gone."""
    start = 0.1 * torch.randn(len(small_basis.A), 4, 4, generator=torch.Generator().manual_seed(2))
    whole = alone(small, small_basis, pair_run("x", small_basis, start=start))
    first = pair_run("x", small_basis, start=start)
    trainer = Trainer(small, small_basis, max_runs=1, token_budget=512)
    trainer.join(first)
    for _ in range(stop_after):
        trainer.step()
    content = checkpoint.to_bytes(first)
    again = CoreRun(
        "x", pair_data("x"), first.plan, small_basis, objective=Preference(), refers_to_base=False
    )
    checkpoint.restore(again, content)
    resumed = alone(small, small_basis, again)
    assert torch.equal(resumed.R, whole.R)
    assert resumed.progress == whole.progress


def test_a_checkpoint_of_another_objective_is_refused(small_basis: Basis) -> None:
    content = checkpoint.to_bytes(pair_run("x", small_basis))
    with pytest.raises(Conflict):
        checkpoint.restore(pair_run("x", small_basis, Preference(beta=0.2)), content)
    with pytest.raises(CorruptRecord):
        checkpoint.restore(pair_run("x", small_basis), content[:-8])


@pytest.mark.parametrize("form", ["lora", "pissa", "lolora"])
def test_lora_forms_learn_from_pairs(small: BaseModel, form: str) -> None:
    """The reference is the base model, and the first loss is that of a coin."""
    factors = initial_factors(small, form, rank=2)
    run = LoraRun(
        "x", pair_data("x"), TrainingPlan(**{**PLAN, "patience": None}), factors, objective=Preference()
    )
    trainer = LoraTrainer(small, [run], token_budget=512)
    updates = finish(trainer, run)
    losses = [update.train_loss for update in updates if update.train_loss is not None]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < losses[0]
    assert run.references is not None
    rows, first = run.data.train_examples[0], run.data.train_chosen[0]
    expected = [answer_logp(small.model, side)[0].item() for side in (rows[:first], rows[first:])]
    assert run.references.logps[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_pairs_without_held_out_ones_train_to_the_end(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    data = pair_data("few", num_train=2, num_valid=0)
    plan = TrainingPlan(**PLAN)
    run, beside = CoreRun("few", data, plan, small_basis, objective=Preference()), make_run("beside")
    assert isinstance(beside, CoreRun)
    trainer = Trainer(small, small_basis, max_runs=2, token_budget=512)
    trainer.join(run)
    trainer.join(beside)
    finish(trainer, run, beside)
    assert run.progress.finish_reason == "completed"
    assert run.published_R.any()
