"""Every case of the quality benchmark runs, on a small random model; its lists, estimates and verdicts."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.automatic import automatic_rate, rates_lines
from benchmarks.quality.cases import CASES, SB_COUNTS
from benchmarks.quality.claims import Finding, reason
from benchmarks.quality.costs import estimate_s, finished_after_s
from benchmarks.quality.data import PERSONAL_EXAMPLES, DataSet, LengthGroupedData
from benchmarks.quality.markdown import CLAIMS
from benchmarks.quality.plots import draw_curves, draw_losses
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.records import read_records, take_over
from benchmarks.quality.results import Results
from benchmarks.quality.settings import PERSONAL_BATCH_SIZE, PERSONAL_EPOCHS, Settings
from benchmarks.quality.tasks import perform, waiting_tasks
from benchmarks.quality.work import PREFIXES, Task, remaining
from tessera.chat.chat_format import EncodedExample
from tessera.errors import InvalidInput
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import VOCABULARY, small_model
from trainer_worker.data.training_data import TrainingData

EARLIER = Path(__file__).parents[2] / "benchmarks/results/quality-h100-small"
MAIN, OTHERS = "jargon", ["foldoc", "devil"]
RANK = 2
SETTINGS = Settings("small", "cpu", examples=12, validation=6, epochs=1, batch_size=6, calibration=12)


@pytest.fixture(scope="module")
def small() -> BaseModel:
    return small_model()


@pytest.fixture(scope="module")
def data() -> dict[str, DataSet]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for index in range(70):
        ids = torch.randint(3, VOCABULARY, (8 + index % 9,), generator=generator).tolist()
        examples.append(EncodedExample(ids, [place > 2 for place in range(len(ids))]))
    full = DataSet("d", TrainingData(tuple(examples[:12]), tuple(examples[12:18]), digest="d"))
    own = DataSet("e", LengthGroupedData(tuple(examples), tuple(examples[:6]), digest="e")).personal()
    return {item.name: item for item in (full, own)}


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_built_and_trained(small: BaseModel, data: dict[str, DataSet], name: str) -> None:
    task = Task("core", ("d",), (name,), RANK, (0,), (1e-2,))
    build, run = (record for record in perform(task, small, data, SETTINGS))
    assert math.isfinite(run.loss)
    assert run.parameters == RANK**2 * 2 * len(CASES[name].target_modules)
    assert build.gain > 0
    if CASES[name].method == "lora_da" and CASES[name].options.get("form") != "two_sided":
        assert build.notes["variance_to_bias"] > 0


def test_personal_data_has_its_own_training(small: BaseModel, data: dict[str, DataSet]) -> None:
    own = data["e-50"]
    assert own.is_personal
    assert not data["d"].is_personal
    assert len(own.data.train) == PERSONAL_EXAMPLES
    plan = SETTINGS.plan(own, rate=1e-2, seed=0)
    assert plan.total_steps == PERSONAL_EPOCHS * math.ceil(PERSONAL_EXAMPLES / PERSONAL_BATCH_SIZE)
    [_, run] = perform(Task("core", ("e-50",), ("lora_xs",), RANK, (0,), (1e-2,)), small, data, SETTINGS)
    assert run.data == "e-50"
    assert math.isfinite(run.loss)


def test_more_examples_catch_more_of_a_fresh_gradient(small: BaseModel, data: dict[str, DataSet]) -> None:
    rows = list(perform(Task("samples", ("d",), (), RANK), small, data, SETTINGS))
    assert [row["examples"] for row in rows] == list(SB_COUNTS)
    assert all(0 < row["share"] <= 1 + 1e-6 for row in rows)


def test_the_part_that_is_known_is_not_done_again() -> None:
    task = Task("lora", ("a",), ("lora", "pissa"), 4, (0, 1), (1e-3, 3e-3))
    known = {("a", "lora:lora", 4, seed, rate) for seed in (0, 1) for rate in (1e-3, 3e-3)}
    known |= {("a", "lora:pissa", 4, 0, 1e-3)}
    left = remaining(task, known, lambda _: ())
    assert left is not None
    assert (left.cases, left.seeds) == (("pissa",), (0, 1)), "one rate of a sweep is not the sweep"
    known |= {("a", "lora:pissa", 4, 0, 3e-3)}
    left = remaining(task, known, lambda _: ())
    assert left is not None
    assert left.seeds == (1,)
    known |= {("a", "lora:pissa", 4, 1, rate) for rate in (1e-3, 3e-3)}
    assert remaining(task, known, lambda _: ()) is None
    probe = Task("recall", ("a",))
    assert remaining(probe, known, lambda _: ()) == probe


def preset_settings(name: str) -> Settings:
    return Settings("small", **PRESETS[name][1])


def test_records_of_an_earlier_run_count(tmp_path: Path) -> None:
    settings = json.loads((EARLIER / "run.json").read_text())["settings"]
    hardware = take_over(EARLIER, tmp_path, settings=settings)
    assert "H100" in hardware["device"]
    assert len(Results(read_records(tmp_path)).runs) == 396
    tasks = PRESETS["h100-20min"][0]([MAIN, *OTHERS])
    left = waiting_tasks(tasks, tmp_path, preset_settings("h100-20min"))
    again = [task for task in left if task.kind == "core" and task.cases == ("lora_xs",) and task.rank == 16]
    seeds = {task.data: task.seeds for task in again}
    assert seeds[MAIN, *OTHERS] == (2,), "two seeds are there"
    assert sum(map(estimate_s, left)) < sum(map(estimate_s, tasks)) - 600
    with pytest.raises(InvalidInput, match="other settings: epochs"):
        take_over(EARLIER, tmp_path, settings={**settings, "epochs": 3})


def test_estimates_are_near_what_was_measured() -> None:
    tasks = {task.name: task for task in PRESETS["h100-9min"][0]([MAIN, *OTHERS])}
    with gzip.open(EARLIER / "records.jsonl.gz", "rt", encoding="utf-8") as lines:
        done = [record for record in map(json.loads, lines) if record["kind"] == "task"]
    measured = [(record["seconds"], estimate_s(tasks[record["name"]])) for record in done]
    assert len(measured) == 22
    assert sum(estimate for _, estimate in measured) == pytest.approx(sum(s for s, _ in measured), rel=0.1)
    assert all(0.6 * seconds < estimate < 1.7 * seconds for seconds, estimate in measured)


def records_of(tasks: list[Task]) -> list[dict[str, Any]]:
    """A result for each run that the tasks make; the figures mean nothing."""
    records: list[dict[str, Any]] = []
    for task in tasks:
        names = [(PREFIXES[task.kind] + case, task.rank) for case in task.cases if task.kind in PREFIXES]
        for data in task.data:
            records.append({"kind": "base", "data": data, "loss": 5.0})
            for case, rank in names:
                build = {"data": data, "case": case, "rank": rank, "seconds": 1.0, "peak_bytes": None}
                records.append({"kind": "build", **build, "gain": 1.0, "notes": {"variance_to_bias": 1.0}})
                for rate, loss in ((1e-4, 4.2), (3e-3, 4.1), (1e-2, 4.0), (3e-1, 4.3)):
                    run = {"data": data, "case": case, "rank": rank, "seed": 0, "rate": rate, "loss": loss}
                    records.append({"kind": "run", **run, "parameters": 16, "train_curve": [[5, 4.0]],
                                    "valid_curve": [[0, 5.0]]})  # fmt: skip
    return records


def test_twenty_minutes_decide_every_ordering(tmp_path: Path) -> None:
    """With the earlier records and what fits into 80 % of the time, every claim has a finding."""
    take_over(EARLIER, tmp_path, settings={})
    tasks = PRESETS["h100-20min"][0]([MAIN, *OTHERS])
    left = waiting_tasks(tasks, tmp_path, preset_settings("h100-20min"))
    ends = finished_after_s(left, workers=4)
    done = [task for task, end in zip(left, ends, strict=True) if end < 0.8 * 1200]
    assert {"recall", "samples"} <= {task.kind for task in done}
    results = Results([*read_records(tmp_path), *records_of(done)])
    assert [claim.name for claim in CLAIMS if not list(claim.check(results))] == ["T15"], "needs its probe"
    ranks = [rank for rank in results.ranks(MAIN) if "lora:lora" in results.cases(MAIN, rank)]
    assert ranks == [2, 4, 8, 16, 32, 64]
    for claim in CLAIMS:
        assert reason(list(claim.check(results))) or claim.name == "T15"


def test_a_verdict_says_why() -> None:
    won = [Finding("d", "best", True, "a < b", 0.2), Finding("e", "best", True, "a < b", 0.1)]
    assert reason(won) == "best of sweep: by 0.100 to 0.200"
    assert reason(won[:1]) == "best of sweep: by 0.200"
    lost = [*won, Finding("f", "best", False, "a < c: 2; 1", -1.0, 0.01, is_edge=True),
            Finding("g", "best", False, "a < d", -0.005)]  # fmt: skip
    said = "f, a < c: 2; 1 (1 of 2 against it are ties, 1 compare with the end of a sweep)"
    assert reason(lost) == f"best of sweep: {said}"
    assert reason([Finding("d", "", True, "the numbers")]) == "measured: the numbers"
    assert reason([]) == ""


def test_the_report_judges_the_automatic_rate() -> None:
    records = records_of([Task("core", ("d",), ("gradient_svd",), 16), Task("lora", ("d",), ("lora",), 16)])
    results = Results(records)
    assert automatic_rate(results, "d", "gradient_svd", 16) == pytest.approx(1.6e-2)
    assert automatic_rate(results, "d", "lora:lora", 16) == pytest.approx(2.5e-3)
    assert automatic_rate(results, "d", "sb_usv", 16) is None, "no job trains it"
    assert automatic_rate(results, "d", "peft:lora", 16) is None
    [_, line] = rates_lines(results)
    assert "in 1 of 2 sweeps; not for lora:lora at rank 16 on d (0.0025; good: 0.01 to 0.01)" in line
    assert rates_lines(Results([])) == []


class Axis:
    """What the plots ask of matplotlib's axes; remembers what was drawn."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.lines: list[Axis] = []
        self.points: list[tuple[float, float]] = []

    def plot(self, xs: Sequence[float], ys: Sequence[float], *_: object, **style: Any) -> None:
        self.labels.append(style.get("label", ""))
        self.points += zip(xs, ys, strict=True)
        self.lines.append(self)

    def axhline(self, y: float, **style: Any) -> None:
        self.labels.append(style["label"])

    def get_color(self) -> str:
        return "black"

    def set_xscale(self, scale: str) -> None:
        assert scale == "log"

    def set(self, **texts: str) -> None:
        assert all(texts.values())

    def legend(self, **style: Any) -> None:
        assert style["fontsize"] > 0


def test_losses_and_learning_curves_are_drawn() -> None:
    tasks = [Task("core", ("d", "d-50"), ("lora_xs", "random"), rank) for rank in (4, 16)]
    results = Results(records_of([*tasks, Task("lora", ("d",), ("lora",), 16)]))
    losses, curves = Axis(), Axis()
    draw_losses(losses, results, "d")
    draw_curves(curves, results, "d")
    assert losses.labels == ["lora_xs", "random", "lora:lora", "base model"]
    assert len(losses.points) == 5, "a point for each method and rank"
    assert curves.labels == ["lora_xs (0.01)", "", "random (0.01)", "", "lora:lora (0.01)", ""]
    assert (5, 4.0) in curves.points, "the training's"
    assert (0, 5.0) in curves.points, "the validation's"
