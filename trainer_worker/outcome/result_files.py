"""The result files of a job: its metrics by step as CSV, in OpenAI's columns, and its report as HTML.

Their ids follow from the job's id, so that a worker that publishes again replaces what it has written before.
They expire with the job.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence

from tessera.queue.preference import DPO
from tessera.queue.records import Job
from tessera.redis import keys
from tessera.store.files import RESULTS, FileStore
from trainer_worker.outcome.report import ReportContent, report_page
from trainer_worker.training.history import StepRow

#: The columns of OpenAI's file.
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


#: The columns of a job on preference pairs, with TRL's names of the accuracies.
PAIR_COLUMNS = ("step", "train_loss", "rewards/accuracies", "valid_loss", "eval_rewards/accuracies")


class ResultFiles:
    """Stores the result files of jobs."""

    def __init__(self, files: FileStore) -> None:
        self._files = files

    async def store(self, content: ReportContent) -> list[str]:
        """Store both files and return their ids, the CSV first. Raises `Unavailable`."""
        job = content.job
        name = job.spec.adapter_id
        columns = PAIR_COLUMNS if job.spec.objective == DPO else COLUMNS
        return [
            await self._put(job, f"{name}-metrics.csv", metrics_csv(content.rows, columns).encode()),
            await self._put(job, f"{name}-report.html", report_page(content).encode(errors="replace")),
        ]

    async def _put(self, job: Job, filename: str, content: bytes) -> str:
        record = await self._files.put(
            job.tenant,
            filename=filename,
            purpose=RESULTS,
            content=content,
            lifetime_s=keys.JOB_TTL_S,
            file_id=_file_id(job, filename),
        )
        return record.file_id


def metrics_csv(rows: Sequence[StepRow], columns: Sequence[str] = COLUMNS) -> str:
    """Return the file's text: one line per step, empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        measured = (row.train_loss, row.train_accuracy, row.valid_loss, row.valid_accuracy)
        writer.writerow([row.step, *("" if value is None else value for value in measured)])
    return text.getvalue()


def _file_id(job: Job, filename: str) -> str:
    kind = filename.rsplit("-", 1)[-1]
    return f"file-{hashlib.sha256(f'{kind} of {job.job_id}'.encode()).hexdigest()[:24]}"
