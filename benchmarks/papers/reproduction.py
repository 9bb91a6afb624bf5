"""One table from its requests to its figures: train every row, choose its rate by validation, judge it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.papers.judging import LmEval, write_task
from benchmarks.papers.service import Service, Trained
from benchmarks.papers.tables import Row, Table
from benchmarks.real.tasks import make_tasks

DICTIONARY = Path(__file__).parents[2] / "examples" / "data"
#: Examples of the dictionary to train on, and to judge by.
DICTIONARY_TRAIN, DICTIONARY_TEST = 60, 40
#: Training by task: epochs and batch size.
TRAINING = {"labels": (5, 8), "dictionary": (3, 8)}


@dataclass(frozen=True)
class Protocol:
    """What is the same for all tables of one call."""

    service: Service
    api_key: str
    seeds: Sequence[int]
    #: None: labels are judged by the loss alone.
    lm_eval: LmEval | None
    timeout_s: float
    report: Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One job of a table."""

    row: Row
    rate: int
    seed: int
    trained: Trained


def reproduce(table: Table, protocol: Protocol) -> dict[str, Any]:
    """Return the table as JSON: a row per row of the paper's, and the base model's."""
    with tempfile.TemporaryDirectory(prefix="tessera-papers-") as name:
        folder = Path(name)
        train, test = write_data(table, folder)
        cells = train_all(table, protocol, protocol.service.upload(train))
        try:
            chosen = choose_rates(table, cells)
            base = protocol.service.base_model()
            judged = [base, *(cell.trained.model for cells in chosen for cell in cells)]
            accuracies = _accuracies(table, protocol, judged, test, folder)
            losses = {model: protocol.service.loss(model, test) for model in judged}
        finally:
            protocol.service.delete([cell.trained.model for cell in cells])
    rows = [_row("the base model", None, None, [base], losses, accuracies)]
    for row, cells_of_row in zip(table.rows, chosen, strict=True):
        models = [cell.trained.model for cell in cells_of_row]
        rate = table.rates[cells_of_row[0].rate]
        rows.append(_row(row.name, row.published, dict(rate), models, losses, accuracies))
    return {
        "paper": table.paper, "table": table.table, "protocol": table.protocol, "scaled": table.scaled,
        "metric": table.metric, "claim": table.claim, "seeds": list(protocol.seeds), "rows": rows,
        "training_s": round(sum(cell.trained.seconds for cell in cells), 1),
    }  # fmt: skip


def write_data(table: Table, folder: Path) -> tuple[Path, Path]:
    """Write the files of examples to train on and to judge by."""
    if table.has_labels:
        [task] = make_tasks(("tickets",), seed=0)
        return task.write(folder)
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, part, count in zip(
        paths, ("train", "heldout"), (DICTIONARY_TRAIN, DICTIONARY_TEST), strict=True
    ):
        lines = (DICTIONARY / f"jargon.{part}.jsonl").read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return paths


def train_all(table: Table, protocol: Protocol, file_id: str) -> list[Cell]:
    """Train every row at every rate with every seed; all jobs are queued first, so that they share steps."""
    num_epochs, batch_size = TRAINING[table.task]
    base = protocol.service.base_model()
    queued = []
    for row in table.rows:
        for rate, hyperparameters in enumerate(table.rates):
            for seed in protocol.seeds:
                body = {
                    "model": base, "training_file": file_id, "seed": seed, "adapter": dict(row.adapter),
                    "hyperparameters": {"n_epochs": num_epochs, "batch_size": batch_size, **hyperparameters},
                    "early_stopping": {"patience": None},
                }  # fmt: skip
                queued.append((row, rate, seed, protocol.service.submit(body)))
    cells = []
    for row, rate, seed, job_id in queued:
        trained = protocol.service.wait(job_id, timeout_s=protocol.timeout_s)
        cells.append(Cell(row, rate, seed, trained))
        protocol.report(
            f"{table.paper}: {len(cells)} of {len(queued)} jobs, {row.name}, {trained.seconds:.0f} s"
        )
    return cells


def choose_rates(table: Table, cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells of each row at the rate with the lowest mean loss on what its jobs held back."""
    chosen = []
    for row in table.rows:
        by_rate = [[c for c in cells if c.row is row and c.rate == rate] for rate in range(len(table.rates))]
        chosen.append(min(by_rate, key=lambda group: statistics.fmean(c.trained.valid_loss for c in group)))
    return chosen


def _accuracies(
    table: Table, protocol: Protocol, models: Sequence[str], test: Path, folder: Path
) -> dict[str, float] | None:
    if not table.has_labels or protocol.lm_eval is None:
        return None
    write_task(test, folder)
    found = protocol.lm_eval.accuracies(protocol.service.url, protocol.api_key, models, folder)
    return dict(zip(models, found, strict=True))


def _row(
    name: str,
    published: float | None,
    rate: dict[str, float] | None,
    models: Sequence[str],
    losses: dict[str, float],
    accuracies: dict[str, float] | None,
) -> dict[str, Any]:
    """Return the figures of one row: means over the seeds, and every seed's."""
    row: dict[str, Any] = {"name": name, "published": published, "rate": rate}
    row["loss"] = round(statistics.fmean(losses[model] for model in models), 4)
    row["losses"] = [round(losses[model], 4) for model in models]
    if accuracies is not None:
        row["accuracy"] = round(statistics.fmean(accuracies[model] for model in models), 4)
        row["accuracies"] = [round(accuracies[model], 4) for model in models]
    return row
