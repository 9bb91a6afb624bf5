"""Preparation of jobs that train a classifier: labelled files, basis, plan, and the head's learning rate."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from tessera.chat.chat_format import ChatFormat
from tessera.errors import InvalidInput, UnsupportedModel
from tessera.formats.head import CLASSIFICATION, PROBLEM_TYPES
from tessera.model.base_model import BaseModel
from tessera.model.pooling import hidden_width
from tessera.queue.hyperparameters import check_together
from tessera.queue.records import JobSpec
from trainer_worker.preparing.basis_source import Attempt, BasisSource, Calibration
from trainer_worker.training import checkpoint
from trainer_worker.training.classification.data import LabelledData, read_labelled
from trainer_worker.training.classification.run import ClassificationRun
from trainer_worker.training.learning_rates import BasisKind
from trainer_worker.training.plan import make_plan, max_example_tokens, validation_share

#: The peak learning rate of a head, the best or next to it in both models of the record
#: benchmarks/results/classification.json, see the decision "A head beside the cores".
AUTO_HEAD_RATE = 3e-3


class ClassificationPreparation:
    """Prepares runs of classifiers."""

    def __init__(self, base: BaseModel, bases: BasisSource) -> None:
        self._base, self._bases = base, bases

    async def prepare(
        self,
        attempt: Attempt,
        labelled: LabelledData,
        calibration: Calibration | None,
        saved: bytes | None,
    ) -> tuple[ClassificationRun, list[str], list[tuple[str, str]]]:
        """Return the run, in the state of the checkpoint `saved` if it fits, messages and warnings.

        Raises `InvalidInput`, `UnsupportedModel`, and what building a basis raises.
        """
        job, spec = attempt.job, attempt.job.spec
        width = hidden_width(self._base.model)
        if width is None:
            raise UnsupportedModel("the base model has no state for a classification head", param="model")
        found = await self._bases.of(attempt, calibration)
        plan = make_plan(
            spec.hyperparameters,
            spec.early_stopping,
            num_examples=labelled.data.num_train,
            kind=BasisKind.of(found.basis),
            seed=spec.seed,
        )
        options = spec.classification or {}

        def make_run() -> ClassificationRun:
            return ClassificationRun(
                job.job_id,
                labelled,
                plan,
                found.basis,
                width=width,
                head_rate=head_rate(options),
                head_only=bool(options.get("head_only")),
                trains_bias=self._base.encoder is not None,
            )

        run, warnings = make_run(), []
        if saved is not None:
            warnings = await asyncio.to_thread(checkpoint.try_restore, run, saved)
            if warnings:
                run = make_run()
        return run, [found.message, classes_message(run)], warnings


async def read_job_data(
    chat: ChatFormat, spec: JobSpec, training: bytes, validation: bytes | None, *, max_tokens: int
) -> LabelledData:
    """Read the files of a job in a thread. Raises `InvalidTrainingData`, `InvalidInput`.

    max_tokens: the worker's limit for an example.
    """
    given = spec.hyperparameters
    check_together(given, has_validation_file=validation is not None)
    problem_type = (spec.classification or {}).get("problem_type") or CLASSIFICATION
    if problem_type not in PROBLEM_TYPES:
        message = f"unknown problem_type {problem_type!r}; known: {', '.join(PROBLEM_TYPES)}"
        raise InvalidInput(message, param="method.classification.problem_type")
    return await asyncio.to_thread(
        read_labelled,
        chat,
        training,
        validation,
        problem_type=problem_type,
        max_tokens=max_example_tokens(given, max_tokens),
        share=validation_share(given),
    )


def head_rate(options: Mapping[str, Any]) -> float:
    """Return the head's peak learning rate: the one of the job, or the automatic one. Raises
    `InvalidInput`."""
    given = options.get("head_learning_rate", "auto")
    if given == "auto":
        return AUTO_HEAD_RATE
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 100:
        message = f"head_learning_rate must be auto or a number above 0, up to 100; got {given!r}"
        raise InvalidInput(message, param="method.classification.head_learning_rate")
    return float(given)


def classes_message(run: ClassificationRun) -> str:
    """Return a sentence for the job's owner on what is trained."""
    what = "the head alone" if run.head_only else "cores and head"
    rate = f"head learning rate {run.head_rate:g}"
    if run.is_regression:
        return f"Regression: {what}, {rate}"
    return f"Classification into {run.num_scores} classes: {what}, {rate}"
