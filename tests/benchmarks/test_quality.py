"""The quality benchmark, tiny: every kind of work once, and the questions that its report answers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import __main__ as command
from benchmarks.quality.cases import CASES
from benchmarks.quality.claims import Claim, Finding
from benchmarks.quality.core_runs import absorbed, build_case, half_noise
from benchmarks.quality.data import DataSet, LengthGroupedData, load_data, mean_token_loss
from benchmarks.quality.markdown import CLAIMS, report
from benchmarks.quality.presets import all_of
from benchmarks.quality.probes import recall, retention
from benchmarks.quality.records import RecordFile, RunRecord, read_records, shortened
from benchmarks.quality.results import Results
from benchmarks.quality.settings import Settings
from benchmarks.quality.tasks import Worker
from benchmarks.quality.work import Task
from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.chat.tokenizer import load_tokenizer
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import InvalidInput
from tessera.model.base_model import BaseModel, load_base_model

DATA = Path(__file__).parents[1] / "data"
SETTINGS = Settings(
    str(BUNDLED_MODEL), "cpu", examples=12, validation=4, epochs=1, batch_size=4, max_tokens=48, calibration=8
)
RANK = 2


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model(BUNDLED_MODEL, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(load_tokenizer(BUNDLED_MODEL))


@pytest.fixture(scope="module")
def data(chat: ChatFormat) -> DataSet:
    return load_data(DATA / "jargon.jsonl", chat, examples=12, validation=4, max_tokens=48, by_length=False)


@pytest.fixture(autouse=True)
def same_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_the_command_measures_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--data", str(DATA / "jargon.jsonl"), "--data", str(DATA / "devil.jsonl"), "--device", "cpu",
        "--methods", "lora_xs", "random", "lora:lora", "lora:pissa", "lora:lolora", "peft:lora",
        "--ranks", str(RANK), "--seeds", "0", "--rates", "0.003", "0.01", "--lora-rates", "0.001",
        "--examples", "8", "--validation", "3", "--epochs", "1", "--batch-size", "4", "--out", str(tmp_path),
    ]  # fmt: skip
    assert command.main(arguments) == 0
    results = Results(read_records(tmp_path))
    assert set(results.base) == {"jargon", "devil"}
    for name in results.datasets:
        assert set(results.cases(name, RANK)) == {
            "lora_xs", "random", "lora:lora", "lora:pissa", "lora:lolora", "peft:lora",
        }  # fmt: skip
        assert set(results.sweep(name, "lora_xs", RANK)) == {0.003, 0.01}
        ours, theirs = (results.loss(name, case, RANK) for case in ("lora:lora", "peft:lora"))
        assert ours is not None
        assert theirs is not None
        assert ours.mean == pytest.approx(theirs.mean, abs=0.05), "another A at random, the same training"
        assert results.parameters(name, "lora:lora", RANK) == results.parameters(name, "peft:lora", RANK)
        assert results.parameters(name, "lora_xs", RANK) == 42 * RANK**2
    num_runs = len(results.runs)
    capsys.readouterr()
    assert command.main(arguments) == 0, "what is done is not done again"
    assert "core" not in capsys.readouterr().out
    assert len(Results(read_records(tmp_path)).runs) == num_runs
    document = json.loads((tmp_path / command.JSON_FILE).read_text())
    assert document["settings"]["model"] == "tiny"
    text = (tmp_path / command.MARKDOWN_FILE).read_text()
    assert "## jargon, rank 2" in text
    assert all(f"| T{number} |" in text for number in range(1, 16))
    assert str(Path.home()) not in text
    assert str(DATA) not in text


def test_unknown_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dora", "lora:dora", "other:lora"):
        arguments = ["--data", str(DATA / "jargon.jsonl"), "--methods", name, "--out", str(tmp_path)]
        assert command.main(arguments) == 2
        assert f"unknown method {name!r}" in capsys.readouterr().err
    with pytest.raises(InvalidInput, match="known: lora_xs"):
        all_of(["nothing"], [2], [0], ["jargon"])


def test_two_workers_share_the_work_and_failures_stay_alone(
    base: BaseModel, data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank that a form cannot have is left out with its reason; the rest is done once."""
    tasks = [
        Task("lora", ("jargon",), ("pissa",), 128, (0,), (1e-3,)),
        Task("base", ("jargon",)),
        Task("core", ("jargon",), ("random",), RANK, (0,), (3e-3,)),
    ]
    sets = {"jargon": data}
    for index in (0, 1):
        Worker(base, sets, SETTINGS, tmp_path, index=index).run(tasks, deadline=math.inf)
    out = capsys.readouterr().out
    assert "rank must be at most 64 for pissa" in out
    assert out.count("core random r2 jargon") == 1
    assert len(Results(read_records(tmp_path)).runs) == 1
    late = Worker(base, sets, SETTINGS, tmp_path / "late")
    late.run(tasks, deadline=0.0)
    assert not list(read_records(tmp_path / "late"))


class Crowded(Worker):
    """A device whose memory others have filled, the first time."""

    num_tries = 0

    def _work(self, task: Task) -> list[RunRecord]:
        self.num_tries += 1
        if self.num_tries == 1:
            raise torch.OutOfMemoryError("out of memory")
        return super()._work(task)


def test_want_of_memory_is_tried_again_later(
    base: BaseModel, data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Crowded(base, {"jargon": data}, SETTINGS, tmp_path)
    worker.run([Task("base", ("jargon",)), Task("base", ("jargon",), rank=1)], deadline=math.inf)
    assert worker.num_tries == 3
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "[0] base jargon",
        "[0] base r1 jargon",
        "[0] base jargon",
    ]
    assert len([record for record in read_records(tmp_path) if record["kind"] == "task"]) == 2


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    records = RecordFile(tmp_path / "records-0.jsonl")
    records.add("base", {"data": "jargon", "loss": math.inf})
    records.close()
    with (tmp_path / "records-0.jsonl").open("a") as file:
        file.write('{"kind": "run", "da')
    assert list(read_records(tmp_path)) == [{"kind": "base", "data": "jargon", "loss": None}]


def test_grouping_by_length_keeps_every_example(chat: ChatFormat) -> None:
    examples = tuple(
        EncodedExample(list(range(3 + i % 40)), [False] + [True] * (2 + i % 40)) for i in range(50)
    )
    data = LengthGroupedData(examples, (), digest="")
    for seed in (0, 1):
        seen = [data.batch(step, batch_size=8, seed=seed) for step in range(7)]
        assert sorted(len(e.token_ids) for batch in seen for e in batch) == sorted(
            len(e.token_ids) for e in examples
        )
        assert seen[0] == data.batch(0, batch_size=8, seed=seed)
        assert seen[0] != data.batch(7, batch_size=8, seed=seed), "another epoch"
        spans = [max(map(_length, batch)) - min(map(_length, batch)) for batch in seen]
        assert sum(spans) / len(spans) < 20
    assert data.batch(0, batch_size=8, seed=0) != data.batch(0, batch_size=8, seed=1)


def _length(example: EncodedExample) -> int:
    return len(example.token_ids)


@pytest.mark.parametrize("name", ["lora_sb", "lora_sb_paper", "sb_usv", "sb_noise"])
def test_starts_and_changes_of_cases(base: BaseModel, data: DataSet, name: str) -> None:
    built = build_case(base, CASES[name], RANK, data, SETTINGS)
    basis, start = built.basis, built.start(1e-3)
    for A, B in zip(basis.A, basis.B, strict=True):
        torch.testing.assert_close(A @ A.T, torch.eye(RANK), atol=1e-5, rtol=0)
        torch.testing.assert_close(B.T @ B, torch.eye(RANK), atol=1e-5, rtol=0)
    if name == "sb_noise":
        assert start is None
    elif name == "lora_sb_paper":
        other = built.start(2e-3)
        assert start is not None
        assert other is not None
        torch.testing.assert_close(other, 2 * start)
    else:
        assert start is not None
        assert float(start.abs().max()) > 0


def test_absorbing_the_start_keeps_its_product(base: BaseModel, data: DataSet) -> None:
    built = build_case(base, CASES["lora_sb"], RANK, data, SETTINGS)
    core = built.start(0.0)
    other, start = absorbed(built.basis, core)
    new = start(0.0)
    assert core is not None
    assert new is not None
    before = built.basis.B[3] @ core[3] @ built.basis.A[3]
    torch.testing.assert_close(other.B[3] @ new[3] @ other.A[3], before, atol=1e-6, rtol=1e-4)
    assert half_noise(built.basis, seed=0).basis_id != built.basis.basis_id


def test_probes_leave_the_model_as_it_was(base: BaseModel, data: DataSet) -> None:
    before = mean_token_loss(base, data.data.valid, token_budget=4096)
    rows = retention(base, data, SETTINGS)
    losses = {(row["group"], row.get("part")): row["loss"] for row in rows if row.get("fraction") != 0.1}
    assert losses["none", None] == pytest.approx(before)
    assert losses["qkv", "top"] < losses["qkv", "bottom"]
    looks = recall(base, data, RANK, 1e-3, SETTINGS)
    assert {row["B"] for row in looks} == {"frozen", "trained"}
    assert all(0 <= row["hpca"] <= 1 and 0 <= row["eva"] <= 1 for row in looks)
    assert mean_token_loss(base, data.data.valid, token_budget=4096) == before


def run_record(case: str, rate: float, loss: float | None, **fields: Any) -> dict[str, Any]:
    chosen = {"kind": "run", "data": "d", "case": case, "rank": 4, "seed": 0, "rate": rate, "loss": loss,
              "parameters": 16, "train_curve": [[5, 4.0], [50, 3.0]], "valid_curve": [[0, 5.0]]}  # fmt: skip
    return {**chosen, **fields}


def test_results_pick_the_best_rate_and_know_divergence() -> None:
    records = [
        {"kind": "base", "data": "d", "loss": 5.0},
        run_record("lora:lora", 1e-3, 4.0),
        run_record("lora_xs", 3e-3, 4.6),
        run_record("lora_xs", 1e-2, 4.4),
        run_record("lora_xs", 1e-2, 4.6, seed=1),
        run_record("lora_xs", 3e-3, 4.6, seed=1),
        run_record("lora_xs", 3e-2, 4.1),
        run_record("lora_xs", 3e-2, None, seed=1),
    ]
    results = Results([*records, records[1]])
    best = results.loss("d", "lora_xs", 4)
    assert best is not None
    assert (best.mean, best.rate, best.num_seeds, best.is_edge) == (4.5, 1e-2, 2, False)
    assert best.std == pytest.approx(0.1 * 2**0.5)
    small = results.loss("d", "lora_xs", 4, "small")
    assert small is not None
    assert small.mean == 4.6
    assert results.loss("d", "lora:lora", 4, "small") is None, "not measured at the common small rate"
    assert results.share("d", "lora_xs", 4) == pytest.approx(0.5)
    assert results.early_loss("d", "lora_xs", 4, 1e-2) == 4.0
    assert len(results.runs) == 7


@pytest.mark.parametrize("sign", [1, -1])
def test_claims_follow_the_numbers(sign: int) -> None:
    """Nothing in a claim is decided beforehand: the opposite numbers give the opposite verdict."""
    names = ("lora_xs", "lora_xs_bottom", "lora_xs_orth", "lora_xs_bottom_orth")
    results = Results([
        run_record(name, rate, 4 + sign * 0.1 * (index % 2 + index // 2 / 2))
        for index, name in enumerate(names) for rate in (3e-3, 1e-2)
    ])  # fmt: skip
    found = {claim.name: list(claim.check(results)) for claim in CLAIMS}
    assert [finding.holds for finding in found["T2"]] == [sign > 0] * 4
    verdict = next(claim for claim in CLAIMS if claim.name == "T2").verdict(found["T2"])
    said = "holds" if sign > 0 else "does not hold"
    assert verdict == f"equal small rate: {said}; best of sweep: {said}"
    assert found["T7"] == []
    claim = Claim("T0", "", "", lambda _: iter(()))
    assert claim.verdict([]) == "not measured"
    mixed = [Finding("d", "best", True, ""), Finding("d", "best", False, "")]
    assert claim.verdict(mixed) == "best of sweep: holds in 1 of 2"


def test_the_report_says_what_was_not_measured() -> None:
    records = [{"kind": "base", "data": "d", "loss": 5.0}, run_record("lora_xs", 3e-3, 4.0)]
    settings = dataclasses.asdict(SETTINGS)
    text = report(Results(records), hardware={"device": "none"}, settings=settings)
    assert text.count("| not measured |") == len(CLAIMS)
    assert "because" in text


def test_curves_are_shortened_without_losing_their_end() -> None:
    curve = shortened([float(i) for i in range(101)], points=10)
    assert len(curve) <= 10
    assert curve[-1][0] == 101
    assert curve[0] == [11, 5.0]
