"""One learning rate of a search, what its evaluations have shown, and which of several rates is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from trainer_worker.training.objectives.objective import Measured
from trainer_worker.training.trainer import CoreRun

#: Whole answers decide between candidates if at least this share of them is right; below, only the loss does.
MIN_EXACT = 0.1
#: Losses that differ by at most this share, and these nats, count as equal. Of equal ones a later state is
#: preferred, because the learning rate has fallen meanwhile, and a smaller learning rate: a state between two
#: large steps may be an unlucky one.
EQUAL_SHARE, EQUAL_NATS = 0.05, 0.002
#: The run on all examples must fit them at least about as well as the folds' runs fit examples that they have
#: not seen. With ten times the tables' rate one was seen at 1.95 nats where the folds had 0.06.
UNSTABLE_SHARE, UNSTABLE_NATS = 1.25, 0.02


class CandidateRun(CoreRun):
    """A run of a candidate: trained like any other run, but judged and ended by the search."""

    #: The last evaluation, and R at that time; None before the first.
    measured: Measured | None = None
    evaluated_R: Tensor | None = None

    def record_evaluation(self, measured: Measured | None) -> None:
        assert measured is not None, "a run without examples to judge it"
        progress = self.progress
        progress.evaluated_at = progress.step
        progress.valid_loss = measured.loss if math.isfinite(measured.loss) else math.inf
        self.measured = measured
        self.evaluated_R = self.R.detach().cpu().clone()
        if progress.step >= self.plan.total_steps or self._should_stop:
            progress.finish_reason = "completed"

    def record_nonfinite(self) -> tuple[str, str]:
        """Leave the step out; the second time the candidate is out of the search."""
        progress = self.progress
        progress.step += 1
        progress.num_nonfinite += 1
        if progress.num_nonfinite > 1:
            progress.finish_reason = "diverged"
        where = f"the loss or its gradient was not finite at step {progress.step}"
        return "nonfinite_skipped", f"{where} with learning rate {self.plan.learning_rate:g}"


@dataclass(frozen=True)
class Evaluation:
    """A candidate on the examples that judge it, at one step."""

    step: int
    #: Nats per token, over all judging examples.
    loss: float
    #: Shares of tokens and of whole answers that are right.
    accuracy: float
    exact: float


class Candidate:
    """One learning rate, with the runs that show how good it is."""

    def __init__(self, multiple: float, final: CandidateRun, judges: Sequence[CandidateRun]) -> None:
        """final: the run that is published. judges: those whose held-out examples count; with folds, `final`
        is not one of them.
        """
        self.multiple, self.final, self.judges = multiple, final, list(judges)
        self.evaluations: list[Evaluation] = []
        #: The lowest loss, and the evaluation of the state to publish: a later one, if it is as good.
        self.best: Evaluation | None = None
        self.kept: Evaluation | None = None
        #: The step at which the search gave it up.
        self.dropped_at: int | None = None

    @property
    def runs(self) -> list[CandidateRun]:
        return self.judges if self.has_held_out else [self.final, *self.judges]

    @property
    def has_held_out(self) -> bool:
        """Whether the run that is published is judged itself."""
        return self.final in self.judges

    @property
    def is_running(self) -> bool:
        return self.dropped_at is None and not any(run.is_finished for run in self.runs)

    @property
    def has_news(self) -> bool:
        """Whether all its runs were evaluated at a step that was not recorded yet."""
        steps = {run.progress.evaluated_at for run in self.runs}
        if len(steps) > 1 or None in steps or self.dropped_at is not None:
            return False
        return not self.evaluations or self.evaluations[-1].step not in steps

    @property
    def has_diverged(self) -> bool:
        return any(run.progress.finish_reason == "diverged" for run in self.runs)

    @property
    def num_answers(self) -> int:
        return sum(len(judge.data.valid) for judge in self.judges)

    def num_bad_evaluations(self, min_delta: float) -> int:
        """Return the number of evaluations since the loss has last fallen by more than min_delta."""
        lowest, num_bad = math.inf, 0
        for evaluation in self.evaluations:
            is_gain = lowest == math.inf or evaluation.loss < lowest - min_delta
            lowest, num_bad = (evaluation.loss, 0) if is_gain else (lowest, num_bad + 1)
        return num_bad

    def record_evaluation(self, *, keep_last: bool) -> Evaluation:
        """Take the evaluations of the runs, and keep the published run's R if it is the one to publish.

        keep_last: publish the last state, not the best.
        """
        evaluation = self._evaluate()
        self.evaluations.append(evaluation)
        if not keep_last and not self._is_stable(evaluation):
            return evaluation
        if self.best is None or evaluation.loss < self.best.loss:
            self.best = self.kept = evaluation
        elif keep_last or self._is_as_good(evaluation):
            self.kept = evaluation
        else:
            return evaluation
        assert self.final.evaluated_R is not None
        self.final.best_R = self.final.evaluated_R
        return evaluation

    def drop(self, step: int) -> None:
        """Give the candidate up."""
        self.dropped_at = step
        self.end("dropped")

    def end(self, reason: str) -> None:
        for run in self.runs:
            run.progress.finish_reason = run.progress.finish_reason or reason

    def written(self) -> dict[str, Any]:
        """Return what the evaluations have shown, as JSON for a checkpoint."""
        return {
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "best": None if self.best is None else asdict(self.best),
            "kept": None if self.kept is None else asdict(self.kept),
            "dropped_at": self.dropped_at,
        }

    def restore(self, written: Mapping[str, Any]) -> None:
        """Take what `written` has returned. Raises `KeyError`, `TypeError`."""
        self.evaluations = [Evaluation(**values) for values in written["evaluations"]]
        self.best = None if written["best"] is None else Evaluation(**written["best"])
        self.kept = None if written["kept"] is None else Evaluation(**written["kept"])
        self.dropped_at = written["dropped_at"]

    def _evaluate(self) -> Evaluation:
        loss = accuracy = exact = 0.0
        num_tokens = num_rows = 0
        for judge in self.judges:
            assert judge.measured is not None
            tokens = sum(row.num_loss_tokens for row in judge.data.valid)
            rows = len(judge.data.valid)
            loss += judge.measured.loss * tokens
            accuracy += judge.measured.accuracy * tokens
            exact += (judge.measured.exact or 0.0) * rows
            num_tokens, num_rows = num_tokens + tokens, num_rows + rows
        loss = loss / num_tokens if math.isfinite(loss) else math.inf
        step = self.final.progress.evaluated_at
        assert step is not None
        return Evaluation(step, loss, accuracy / num_tokens, exact / num_rows)

    def _is_stable(self, evaluation: Evaluation) -> bool:
        if self.has_held_out or not evaluation.step:
            return True
        assert self.final.measured is not None
        return self.final.measured.loss <= UNSTABLE_SHARE * evaluation.loss + UNSTABLE_NATS

    def _is_as_good(self, evaluation: Evaluation) -> bool:
        assert self.best is not None
        is_near = evaluation.loss <= self.best.loss + _tolerance(self.best.loss)
        return is_near and evaluation.exact >= self.best.exact


def rank_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates, the best first.

    Those whose share of right whole answers is within one standard error of the best come first; among them
    the lower loss is better, and of nearly equal losses the one with the smaller learning rate.
    """
    best = max(_exact(candidate) for candidate in candidates)
    num_answers = max(candidate.num_answers for candidate in candidates)
    error = math.sqrt(max(best * (1 - best), 1 / num_answers) / num_answers)

    def is_behind(candidate: Candidate) -> bool:
        return best >= MIN_EXACT and _exact(candidate) < best - error

    ahead = [candidate for candidate in candidates if not is_behind(candidate)]
    lowest = min(_loss(candidate) for candidate in ahead)

    def order(candidate: Candidate) -> tuple[bool, float, float]:
        loss = _loss(candidate)
        is_equal = loss <= lowest + _tolerance(lowest)
        return is_behind(candidate), lowest if is_equal else loss, candidate.multiple

    return sorted(candidates, key=order)


def _tolerance(loss: float) -> float:
    """Nats by which another loss may be higher and still counts as good."""
    return min(EQUAL_SHARE * loss, EQUAL_NATS)


def _loss(candidate: Candidate) -> float:
    return math.inf if candidate.best is None else candidate.best.loss


def _exact(candidate: Candidate) -> float:
    return 0.0 if candidate.best is None else candidate.best.exact
