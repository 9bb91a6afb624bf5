"""The population benchmark, tiny: all its work once, going on after a cut, and its report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.population import __main__ as command
from benchmarks.population.presets import PRESETS
from benchmarks.population.report import tables
from benchmarks.population.score import Job, matmul_precision
from benchmarks.population.tasks import Setting, Task, perform
from benchmarks.population.users import Sizes, make_cast, read_files
from benchmarks.quality.records import read_records
from tessera.chat.chat_format import ChatFormat
from tessera.chat.tokenizer import load_tokenizer
from tessera.defaults import BUNDLED_MODEL
from tessera.model.base_model import BaseModel, load_base_model

DATA = Path(__file__).parents[1] / "data"
FILES = [DATA / "jargon.jsonl", DATA / "devil.jsonl"]
SIZES = Sizes(12, 4, 8)


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
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=6,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(model_dir: Path) -> BaseModel:
    return load_base_model(str(model_dir), device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def same_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def setting_of(base: BaseModel, sizes: Sizes = SIZES) -> Setting:
    files = read_files(FILES, ChatFormat(load_tokenizer(BUNDLED_MODEL)))
    files = {name: examples[:40] for name, examples in files.items()}
    cast = make_cast("main", files, seen=["jargon"], unseen=["devil"], sizes=sizes, seeds={12: (0,)})
    return Setting(base, {"main": cast}, 2048, False, rates=(1e-2,), lora_rates=(1e-3,))


def test_newcomers_are_nobody_of_the_population(base: BaseModel) -> None:
    cast = setting_of(base).casts["main"]
    taught = {tuple(example[0]) for example in cast.population.examples}

    assert {newcomer.name for newcomer in cast.newcomers} == {"jargon-0", "devil-0", "devil-1"}
    assert [newcomer.is_new_file for newcomer in cast.newcomers] == [False, True, True]
    for newcomer in cast.newcomers:
        assert (len(newcomer.train), len(newcomer.test)) == (12, 4)
        own = {tuple(example.token_ids) for example in (*newcomer.train, *newcomer.test)}
        assert not own & taught
    assert len(cast.population.sizes) >= 2


def test_a_seed_takes_another_part_of_the_examples(base: BaseModel) -> None:
    newcomer = setting_of(base).casts["main"].newcomers[0]
    first, second = (Job(newcomer, 5, seed, 1e-3).data() for seed in (0, 1))

    assert len(first.train) == len(second.train) == 5
    assert first.train != second.train
    assert first.valid == second.valid == newcomer.test


@pytest.mark.parametrize(
    ("task", "num_runs", "parameters"),
    [
        (Task("own gradient", "basis", 2, "gradient_svd", "own"), 3, 7 * 4),
        (Task("xs", "basis", 2, "lora_xs", starts=("zero", "gradient")), 6, 7 * 4),
        (Task("lora after the population's", "pooled_lora", 2), 3, 2 * (7 * 32 + 32 * 4 + 48 * 3)),
        (
            Task("few", "basis", 2, "population", "users", options={"num_taught": 2, "passes": 0.1}),
            3,
            7 * 4,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else "",
)
def test_every_kind_of_work(base: BaseModel, task: Task, num_runs: int, parameters: int) -> None:
    records = list(perform(task, setting_of(base)))
    runs = [record for record in records if record["kind"] == "run"]

    assert len(runs) == num_runs
    assert {run["newcomer"] for run in runs} == {"jargon-0", "devil-0", "devil-1"}
    assert all(run["num_parameters"] == parameters for run in runs)
    assert all(0 < run["loss"] < run["first_loss"] + 0.1 for run in runs)
    if task.options:
        assert records[0]["num_users"] == 2


def test_the_command_reports_and_goes_on_after_a_cut(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model", str(model_dir), "--device", "cpu", "--out", str(tmp_path),
        "--data", str(FILES[0]), "--new-data", str(FILES[1]),
    ]  # fmt: skip
    assert command.main([*arguments, "--only", "lora"]) == 0
    path = tmp_path / command.RECORDS_FILE
    whole = path.read_text()
    assert "lora, rank 4" in capsys.readouterr().out

    # Cut within the record that says that the task is complete: the task is done again.
    path.write_text(whole[: whole.rindex('"digest"')] + "\n")
    assert command.main(arguments) == 0
    output = capsys.readouterr().out
    assert [line.split(",")[0] for line in output.splitlines() if line.startswith("[0]")] == [
        "[0] lora", "[0] learned", "[0] pooled gradient",
    ]  # fmt: skip
    done = path.read_text()

    assert command.main(arguments) == 0
    assert path.read_text() == done
    assert command.main(["--report", "--out", str(tmp_path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "population.md", "records-0.jsonl", "run.json",
    ]  # fmt: skip
    report = (tmp_path / command.MARKDOWN_FILE).read_text()
    found = {(row.method, row.start) for row in tables(list(read_records(tmp_path)))[0].rows}
    assert found == {
        ("lora", "zero"),
        ("learned", "zero"),
        ("learned", "population"),
        ("pooled gradient", "zero"),
    }
    assert "| lora | 4 | zero |" in report
    assert "devil-0" in json.loads((tmp_path / command.RUN_FILE).read_text())["casts"][0]["newcomers"]


def run(method: str, newcomer: str, rate: float, loss: float | None, **fields: object) -> dict[str, object]:
    return {
        "kind": "run", "cast": "c", "method": method, "rank": 4, "start": "zero", "num_examples": 50,
        "seed": 0, "newcomer": newcomer, "rate": rate, "first_loss": 5.0, "loss": loss,
        "num_parameters": 10, **fields,
    }  # fmt: skip


def test_shares_are_of_loras_improvement_at_the_best_rates() -> None:
    records = [{"kind": "base", "cast": "c", "newcomer": name, "loss": 5.0} for name in "ab"]
    records += [run("lora", "a", 0.1, 4.0), run("lora", "a", 0.2, 4.2)]
    records += [run("lora", "b", 0.1, 3.0), run("lora", "b", 0.2, None)]
    records += [run("new", "a", 1.0, 4.6), run("new", "a", 2.0, 4.1)]
    records += [run("new", "b", 1.0, 9.9), run("new", "b", 1.0, 3.4), run("new", "b", 2.0, 4.0)]  # done again
    records += [run("late", "a", 1.0, 3.0)]  # cut off before the other newcomer
    records += [run("bad", name, 1.0, None) for name in "ab"]

    (table,) = tables(records)

    assert [row.method for row in table.rows] == ["lora", "new"]
    new = table.rows[1]
    assert new.best == {"a": 4.1, "b": 3.4}
    assert table.shares(new) == pytest.approx({"a": 0.9, "b": 0.8})
    assert new.rate == 1.0
    assert new.is_edge
    assert table.shares(new, is_common=True) == pytest.approx({"a": 0.4, "b": 0.8})


def test_the_preset_for_the_gpu_begins_with_what_decides_the_targets() -> None:
    tasks = PRESETS["h100-150s"].tasks

    assert [(task.name, task.rank) for task in tasks[:3]] == [
        ("learned, 3 passes", 16), ("learned, 3 passes", 64), ("lora", 16),
    ]  # fmt: skip
    for preset in PRESETS.values():
        assert len({task.digest for task in preset.tasks}) == len(preset.tasks)


def test_fast_products_end_with_the_block() -> None:
    torch.set_float32_matmul_precision("highest")
    with matmul_precision(is_fast=True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"
