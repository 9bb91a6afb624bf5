"""Result files: the CSV of a real job, and its report, also with text that attacks the reader's browser."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.formats.adapter import Adapter
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel
from tessera.queue.client import Job, JobSpec, JobStatus
from tessera.redis import keys
from tests.trainer_worker.conftest import VOCABULARY
from tests.trainer_worker.world import TENANT, World
from trainer_worker.outcome.charts import Line, line_chart
from trainer_worker.outcome.report import ReportContent, report_page
from trainer_worker.outcome.result_files import COLUMNS, metrics_csv
from trainer_worker.outcome.samples import GreedyPair, SampleAnswers, last_answer
from trainer_worker.training.history import MAX_ROWS, History, StepRow
from trainer_worker.training.run import RunUpdate

HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & \ud83d \u202e"


class Seen(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "polyline", "circle", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("polyline", "circle", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_self_contained(page: str) -> Seen:
    """Nothing in the page runs, and nothing is loaded."""
    seen = Seen(page)
    assert not seen.open, "every element is closed"
    assert not {"script", "img", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in seen.tags}
    for _, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href")]
    assert not re.search(r"@import|url\(", page)
    return seen


async def test_a_job_has_a_csv_and_a_report(
    redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path
) -> None:
    world = World(redis, tiny, chat, tmp_path)
    job_id = await world.submit(lines=20, epochs=2, metadata={"note": HOSTILE})
    async with world.worker(report_samples=2, learning_rate_search=False):
        job = await world.ended(job_id)
    assert job.status is JobStatus.SUCCEEDED, job.error
    assert job.result is not None
    records = [await world.files.get(TENANT, file_id) for file_id in job.result["result_files"]]
    assert [record.filename for record in records] == ["devil-metrics.csv", "devil-report.html"]
    assert {record.purpose for record in records} == {"fine-tune-results"}
    lifetimes = [await redis.ttl(keys.file_content(TENANT, record.file_id)) for record in records]
    assert all(keys.JOB_TTL_S - 600 < lifetime <= keys.JOB_TTL_S for lifetime in lifetimes)

    text = (await world.files.content(TENANT, records[0].file_id)).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == list(range(job.result["steps"] + 1))
    assert all(row["train_loss"] and row["train_accuracy"] for row in rows[1:])
    losses = [float(row["valid_loss"]) for row in rows if row["valid_loss"]]
    assert losses[0] == pytest.approx(job.result["initial_valid_loss"], rel=1e-5)
    assert min(losses) == pytest.approx(job.result["best_valid_loss"], rel=1e-5)

    page = (await world.files.content(TENANT, records[1].file_id)).decode()
    seen = check_self_contained(page)
    assert page.count("<svg") == 2
    assert "Answers side by side" in seen.text
    assert sum(attributes.get("class") == "sample" for _, attributes in seen.tags) == 2
    assert "alert(1)" in seen.text, "the metadata are shown as text"
    counts = job.result["data"]
    assert counts["num_examples"] == counts["num_train"] + counts["num_validation"] == 20


async def test_a_job_that_changes_workers_has_one_whole_csv(
    redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path
) -> None:
    world = World(redis, tiny, chat, tmp_path)
    job_id = await world.submit(lines=20, epochs=3, early_stopping={"patience": None})
    async with world.worker(learning_rate_search=False):
        await world.under_way(job_id, step=5)
    async with world.worker(learning_rate_search=False):
        job = await world.ended(job_id)
    assert job.result is not None
    text = (await world.files.content(TENANT, job.result["result_files"][0])).decode()
    steps = [int(row["step"]) for row in csv.DictReader(io.StringIO(text)) if row["train_loss"]]
    assert steps == list(range(1, job.progress["total_steps"] + 1))


def test_the_tuned_answer_is_that_of_merged_weights(small: BaseModel) -> None:
    basis = build_basis(small, rank=4)
    R = torch.randn(basis.num_modules, 4, 4, generator=torch.Generator().manual_seed(5))
    pair = GreedyPair(small, Adapter(basis.basis_id, R), basis, end_ids=[VOCABULARY + 1])
    prompt = [3, 14, 15, 9, 26]
    base, tuned = pair.answers(prompt, max_new_tokens=12, ends_at=float("inf"))
    assert base == greedy(small, prompt)
    for index, module in enumerate(basis.manifest.modules):
        weight = small.model.get_submodule(module.name).weight
        weight.data += basis.B[index].double() @ R[index].double() @ basis.A[index].double()
    assert tuned == greedy(small, prompt)
    assert tuned != base
    ended = GreedyPair(small, Adapter(basis.basis_id, R), basis, end_ids=[tuned[3]])
    assert ended.answers(prompt, max_new_tokens=12, ends_at=0.0)[0] == greedy(small, prompt)[:1]


def greedy(base: BaseModel, prompt: list[int]) -> list[int]:
    """The reference: no cache, one row."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, base.model(ids).logits[:, -1].argmax(-1)[:, None]], 1)
    return [int(token) for token in ids[0, len(prompt) :]]


def test_the_last_answer_of_an_example_follows_its_prompt() -> None:
    mask = [False, True, True, False, False, True, True]
    assert last_answer([EncodedExample(list(range(7)), mask)]) == ([0, 1, 2, 3, 4], [5, 6])
    assert last_answer([EncodedExample([7, 8, 9], [False, True, True])]) == ([7], [8, 9])


def hostile_content(**changes: Any) -> ReportContent:
    spec = JobSpec(
        adapter_id="anna", base_model=HOSTILE, warm_start_from=HOSTILE, metadata={HOSTILE: HOSTILE}
    )
    job = Job(HOSTILE, "t", spec, JobStatus.RUNNING, 0.0, 0.0, None, 1, 1, 1, {}, None, None, None)
    sample = SampleAnswers(*([HOSTILE] * 4))
    candidate = {"learning_rate": HOSTILE, "valid_loss": 0.5, "exact": HOSTILE, "chosen": True}
    result = {
        "version": HOSTILE, "finish_reason": HOSTILE, "warnings": [{"code": "x", "message": HOSTILE}],
        "search": {"candidates": [candidate, {"learning_rate": 1e-3}]}, "data": {"num_examples": HOSTILE},
    }  # fmt: skip
    rows = [
        StepRow(0, valid_loss=3.0),
        StepRow(1, 2.5, 0.4, None, None),
        StepRow(2, float("inf"), 0.5, 2.0, 0.6),
    ]
    fields = {
        "job": job, "result": result, "hyperparameters": {HOSTILE: HOSTILE}, "rows": rows,
        "samples": [sample], "made_at": 1.8e9,
    }  # fmt: skip
    return ReportContent(**{**fields, **changes})


def test_hostile_text_stays_text_everywhere_in_the_report() -> None:
    page = report_page(hostile_content())
    seen = check_self_contained(page.encode(errors="replace").decode())
    assert "<script" not in page
    assert seen.text.count("alert(1)") >= 13
    assert "Candidates of the search" in seen.text
    assert re.search(r'<tr class="chosen">', page)


def test_a_report_of_nothing_is_a_page_too() -> None:
    job = hostile_content().job
    page = report_page(ReportContent(job, {}, {}, [], [], made_at=0.0))
    check_self_contained(page.encode(errors="replace").decode())
    assert "<svg" not in page
    assert "No answers were generated" in page


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [1e-9, 1e9], [float("nan"), 1.0], list(range(5000))])
def test_charts_stay_in_their_frame(values: list[float]) -> None:
    svg = line_chart("t", [Line("a", "train", list(enumerate(values)))])
    points = re.search(r'points="([^"]+)"', svg)
    assert points is not None
    coordinates = [tuple(map(float, pair.split(","))) for pair in points[1].split()]
    assert len(coordinates) <= 600
    assert all(0 <= x <= 640 and 0 <= y <= 240 for x, y in coordinates)
    assert line_chart("t", [Line("a", "train", [(0, float("inf"))])]) == ""


def test_a_history_is_bounded_and_keeps_every_evaluation() -> None:
    history = History()
    for step in range(1, 10_001):
        if step % 500 == 1:
            history.note(RunUpdate("a", step - 1, valid_loss=1.0, valid_accuracy=0.5))
        history.note(RunUpdate("a", step, learning_rate=1e-3, train_loss=1 / step, train_accuracy=0.1))
    assert len(history.rows) <= MAX_ROWS
    assert sum(row.is_evaluated for row in history.rows) == 20
    assert len(json.dumps(history.to_json())) < 300_000
    again = History.from_json(json.loads(json.dumps(history.to_json())))
    assert again.rows == history.rows
    # A trainer that reports both in one update has evaluated before the step.
    both = History()
    both.note(RunUpdate("a", 1, learning_rate=1e-3, train_loss=2.0, valid_loss=3.0))
    assert metrics_csv(both.rows).splitlines() == [",".join(COLUMNS), "0,,,3.0,", "1,2.0,,,"]
