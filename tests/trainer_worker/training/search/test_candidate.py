"""Which of several candidates is better, and which state of one is kept."""

from __future__ import annotations

import pytest
import torch

from tessera.formats.basis import Basis
from tests.trainer_worker.conftest import random_examples
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.objectives.objective import Measured
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.search.candidate import Candidate, CandidateRun, rank_candidates

PLAN = TrainingPlan(num_epochs=1, batch_size=4, total_steps=100, learning_rate=1e-2, seed=3)


def make_run(basis: Basis, *, num_valid: int = 20) -> CandidateRun:
    data = TrainingData(random_examples(1, 4), random_examples(2, num_valid), digest="d")
    return CandidateRun("run", data, PLAN, basis)


def make_candidate(basis: Basis, multiple: float = 1.0, *, has_folds: bool = False) -> Candidate:
    final = make_run(basis)
    return Candidate(multiple, final, [make_run(basis), make_run(basis)] if has_folds else [final])


def evaluate(candidate: Candidate, *measured: tuple[float, float]) -> None:
    """Record these evaluations as (loss, exact), ten steps and a change of R apart."""
    for loss, exact in measured:
        for run in candidate.runs:
            run.record_evaluation(Measured(loss, 0.5, exact))
        assert candidate.has_news
        candidate.record_evaluation(keep_last=False)
        assert not candidate.has_news
        for run in candidate.runs:
            run.R = run.R + 1
            run.progress.step += 10


@pytest.mark.parametrize(
    ("first", "second", "better"),
    [
        ((0.5, 0.9), (0.2, 0.9), 1),  # the lower loss
        ((0.2, 0.3), (0.5, 0.9), 1),  # many more right answers
        ((0.2, 0.9), (0.5, 0.93), 0),  # one more right answer may be luck
        ((0.5, 0.0), (0.2, 0.05), 1),  # hardly any right answer: texts, so that the loss counts
        ((1.0, 0.5), (0.999, 0.5), 0),  # equal: the smaller rate
    ],
)
def test_whole_answers_and_then_losses_decide(
    small_basis: Basis, first: tuple[float, float], second: tuple[float, float], better: int
) -> None:
    candidates = [make_candidate(small_basis, 1.0), make_candidate(small_basis, 3.0)]
    evaluate(candidates[0], first)
    evaluate(candidates[1], second)
    assert rank_candidates(candidates)[0] is candidates[better]
    assert rank_candidates(candidates[::-1])[0] is candidates[better]


def test_the_lowest_loss_is_kept_and_a_later_equal_one_preferred(small_basis: Basis) -> None:
    candidate = make_candidate(small_basis)
    evaluate(candidate, (3.0, 0.0), (1.0, 0.5), (1.001, 0.5), (1.2, 0.5), (1.0005, 0.4))
    assert candidate.best is not None
    assert candidate.kept is not None
    assert (candidate.best.step, candidate.kept.step) == (10, 20)
    assert torch.equal(candidate.final.best_R, torch.full_like(candidate.final.R, 2.0))
    assert candidate.num_bad_evaluations(0.0) == 3
    assert candidate.num_bad_evaluations(2.5) == 4


def test_a_state_that_does_not_fit_its_own_examples_is_not_kept(small_basis: Basis) -> None:
    candidate = make_candidate(small_basis, has_folds=True)
    evaluate(candidate, (3.0, 0.0))
    for judge in candidate.judges:
        judge.record_evaluation(Measured(0.1, 0.5, 1.0))
    candidate.final.record_evaluation(Measured(2.0, 0.5, 0.0))
    candidate.record_evaluation(keep_last=False)
    assert candidate.kept is not None
    assert candidate.kept.step == 0


def test_the_judges_count_by_their_tokens_and_answers(small_basis: Basis) -> None:
    judges = [make_run(small_basis, num_valid=5), make_run(small_basis, num_valid=15)]
    candidate = Candidate(1.0, make_run(small_basis), judges)
    candidate.final.record_evaluation(Measured(1.0, 0.5, 0.0))
    judges[0].record_evaluation(Measured(1.0, 0.5, 0.2))
    judges[1].record_evaluation(Measured(3.0, 0.5, 1.0))
    evaluation = candidate.record_evaluation(keep_last=False)
    tokens = [sum(row.num_loss_tokens for row in judge.data.valid) for judge in judges]
    assert evaluation.loss == pytest.approx((tokens[0] + 3 * tokens[1]) / sum(tokens))
    assert evaluation.exact == pytest.approx((0.2 * 5 + 1.0 * 15) / 20)
