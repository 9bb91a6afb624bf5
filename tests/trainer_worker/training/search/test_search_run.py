"""A search on a small model: its candidates, what is published, and a checkpoint in the middle."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tessera.queue.hyperparameters import LAST
from tests.trainer_worker.conftest import MakeRun, random_examples
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training import checkpoint
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.run import RunUpdate
from trainer_worker.training.search.ladder import MULTIPLES, ONE_RUN, Ladder
from trainer_worker.training.search.search_run import FROM_BASE, SearchRun, Start
from trainer_worker.training.trainer import CoreRun, Trainer

NUM_EXAMPLES = 12
STEPS = 24


def make_data(num_folds: int, *, seed: int = 5) -> TrainingData:
    examples = random_examples(seed, NUM_EXAMPLES)
    if num_folds:
        return TrainingData(examples, (), digest="d", groups=tuple(map(str, range(NUM_EXAMPLES))))
    return TrainingData(examples[:8], examples[8:], digest="d")


def make_search(
    basis: Basis,
    ladder: Ladder,
    *,
    start: Start = FROM_BASE,
    **plan: Any,
) -> SearchRun:
    fields = {
        "num_epochs": 1,
        "batch_size": 4,
        "total_steps": STEPS,
        "learning_rate": 1e-2,
        "seed": 3,
        "evaluate_every": 2,
    }
    made = TrainingPlan(**{**fields, **plan})
    return SearchRun("job", make_data(ladder.num_folds), made, basis, ladder, start=start)


def train(run: SearchRun, trainer: Trainer) -> list[RunUpdate]:
    updates = []
    while not run.is_finished:
        updates += trainer.step()
    return updates


@pytest.mark.parametrize("num_folds", [0, 3])
def test_the_best_candidate_is_published_and_the_others_are_dropped(
    small: BaseModel, small_basis: Basis, num_folds: int
) -> None:
    run = make_search(small_basis, Ladder(MULTIPLES, num_folds), patience=None)
    updates = train(run, run.make_trainer(small, max_runs=1, token_budget=4096))
    report = run.search_report
    assert sorted(candidate["steps"] < STEPS for candidate in report["candidates"]) == [
        False,
        True,
        True,
        True,
    ]
    [chosen] = [candidate for candidate in report["candidates"] if candidate["chosen"]]
    assert run.published_plan.learning_rate == chosen["learning_rate"]
    assert run.published_valid_loss == chosen["valid_loss"]
    assert run.progress.finish_reason == updates[-1].finish_reason == "completed"
    assert {update.run_id for update in updates} == {"job"}
    assert len([note for update in updates for note in update.notes]) == 4  # three dropped, one chosen
    assert torch.equal(run.published_R, run.leader.final.best_R)


def test_a_candidate_trains_as_it_would_alone(small: BaseModel, small_basis: Basis) -> None:
    run = make_search(small_basis, Ladder((1.0, 3.0), 2), patience=None)
    trainer = run.make_trainer(small, max_runs=1, token_budget=4096)
    for _ in range(5):
        trainer.step()
    final = run.candidates[1].final
    plan = dataclasses.replace(run.plan, learning_rate=3e-2)
    alone = CoreRun("alone", TrainingData(run.data.train, (), digest="d"), plan, small_basis)
    beside = alone.make_trainer(small, max_runs=1, token_budget=4096)
    for _ in range(5):
        beside.step()
    torch.testing.assert_close(final.R, alone.R, rtol=1e-9, atol=1e-12)


def test_the_judges_of_a_fold_have_not_seen_its_examples(small_basis: Basis) -> None:
    run = make_search(small_basis, Ladder((1.0,), 3))
    [candidate] = run.candidates
    judged: list[int] = []
    for judge in candidate.judges:
        assert not set(map(id, judge.data.train)) & set(map(id, judge.data.valid))
        judged += map(id, judge.data.valid)
    assert sorted(judged) == sorted(map(id, run.data.train)) == sorted(map(id, candidate.final.data.train))


def test_a_checkpoint_continues_the_search_exactly(small: BaseModel, small_basis: Basis) -> None:
    ladder = Ladder(MULTIPLES, 2)
    start = Start(torch.full((small_basis.num_modules, 4, 4), 1e-3), is_base=False)
    run = make_search(small_basis, ladder, start=start, patience=None)
    trainer = run.make_trainer(small, max_runs=1, token_budget=4096)
    for _ in range(STEPS // 2):  # two candidates have been dropped
        trainer.step()
    content = checkpoint.to_bytes(run)
    other = make_search(small_basis, ladder, start=Start(is_base=False), patience=None)
    checkpoint.restore(other, content)
    train(run, trainer)
    train(other, other.make_trainer(small, max_runs=3, token_budget=4096))
    assert torch.equal(run.published_R, other.published_R)
    assert run.search_report == other.search_report
    assert run.progress == other.progress


def test_other_runs_are_trained_beside_a_search_and_its_slots_are_given_back(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    beside, alone = make_run("beside"), make_run("beside")
    trainer = Trainer(small, small_basis, max_runs=2, token_budget=4096)
    assert isinstance(beside, CoreRun)
    trainer.join(beside)
    run = make_search(small_basis, Ladder(MULTIPLES, 3))
    trainer.join(run)
    assert trainer.runs == [beside, run]
    assert not trainer.has_room
    while not (run.is_finished and beside.is_finished):
        trainer.step()
    assert trainer.leave("job") is run
    assert trainer.leave("beside") is beside
    assert trainer.runs == []
    lonely = alone.make_trainer(small, max_runs=1, token_budget=4096)
    while not alone.is_finished:
        lonely.step()
    torch.testing.assert_close(beside.best_R, alone.best_R, rtol=1e-9, atol=1e-12)


def test_the_base_model_is_published_if_nothing_is_better(small: BaseModel, small_basis: Basis) -> None:
    for seed in range(20):  # the model is random, so that some random cores are better than it
        torch.manual_seed(seed)
        worse = torch.randn(small_basis.num_modules, 4, 4)
        run = make_search(small_basis, ONE_RUN, start=Start(worse, is_base=False), learning_rate=1e-9)
        train(run, run.make_trainer(small, max_runs=1, token_budget=4096))
        if run.progress.initial_valid_loss > run.progress.base_valid_loss:
            break
    assert not run.published_R.any()
    assert run.published_valid_loss == run.progress.base_valid_loss
    initial, base = run.progress.initial_valid_loss, run.progress.base_valid_loss
    assert initial is not None
    assert base is not None
    assert initial > base

    mine = make_search(
        small_basis, ONE_RUN, start=Start(worse, is_base=False, is_adapter=True), learning_rate=1e-9
    )
    train(mine, mine.make_trainer(small, max_runs=1, token_budget=4096))
    assert mine.published_R.any(), "an owner's adapter is not replaced"


def test_a_stop_publishes_the_best_state_so_far(small: BaseModel, small_basis: Basis) -> None:
    run = make_search(small_basis, Ladder(MULTIPLES, 2))
    trainer = run.make_trainer(small, max_runs=1, token_budget=4096)
    for _ in range(5):
        trainer.step()
    run.is_stop_requested = True
    updates = train(run, trainer)
    assert run.progress.finish_reason == "stopped"
    assert updates[-1].step <= 7
    assert run.published_valid_loss is not None


def test_the_last_state_is_published_on_request(small: BaseModel, small_basis: Basis) -> None:
    run = make_search(small_basis, Ladder(MULTIPLES, 0), publish=LAST, patience=None)
    train(run, run.make_trainer(small, max_runs=1, token_budget=4096))
    assert run.published_step == STEPS


def test_a_candidate_that_diverges_leaves_the_search(small: BaseModel, small_basis: Basis) -> None:
    run = make_search(small_basis, Ladder((1.0, 1e200), 2), patience=None)
    train(run, run.make_trainer(small, max_runs=1, token_budget=4096))
    assert run.leader.multiple == 1.0
    assert run.progress.finish_reason == "completed"
    assert torch.isfinite(run.published_R).all()


def test_the_leaders_states_can_be_served_while_the_search_goes_on(
    small: BaseModel, small_basis: Basis
) -> None:
    run = make_search(small_basis, Ladder(MULTIPLES, 2), patience=None)
    trainer = run.make_trainer(small, max_runs=1, token_budget=4096)
    steps = []
    while not run.is_finished:
        for update in trainer.step():
            run.note(update)
        while run.states:
            state = run.states.popleft()
            assert state.R.shape == run.published_R.shape
            steps.append(state.step)
    assert steps == list(range(2, STEPS + 1, 2))
    assert run.history.at(STEPS).is_evaluated
