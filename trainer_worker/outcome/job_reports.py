"""The report and the result files of finished jobs. Nothing that goes wrong here fails a job."""

from __future__ import annotations

import logging
import time
from typing import Any

from tessera.errors import TesseraError
from tessera.queue.records import Job
from trainer_worker.outcome import payloads
from trainer_worker.outcome.report import ReportContent
from trainer_worker.outcome.result_files import ResultFiles
from trainer_worker.outcome.samples import SampleAnswers, SampleMaker
from trainer_worker.training.run import RunResult, TrainRun

logger = logging.getLogger(__name__)


class JobReports:
    """Makes the samples of a run, and stores its files."""

    def __init__(self, samples: SampleMaker, files: ResultFiles) -> None:
        self._samples, self._files = samples, files

    async def make_samples(
        self, run: TrainRun, trained: RunResult, *, training_s: float
    ) -> list[SampleAnswers]:
        """Return answers for the report; none if they cannot be made."""
        basis = trained.own_basis or trained.stored_basis
        if basis is None:
            return []
        try:
            return await self._samples.make(run, trained.adapter, basis, training_s=training_s)
        except Exception:
            logger.exception("job %s: the answers for its report could not be generated", run.run_id)
            return []

    async def store(
        self, job: Job, run: TrainRun, result: dict[str, Any], samples: list[SampleAnswers]
    ) -> list[str]:
        """Store the CSV and the report, and return their ids; none if the store refuses them."""
        content = ReportContent(
            job, result, payloads.chosen_hyperparameters(run), run.history.rows, samples, made_at=time.time()
        )
        try:
            return await self._files.store(content)
        except TesseraError as error:
            logger.warning("job %s: its result files could not be stored: %s", job.job_id, error)
            return []
