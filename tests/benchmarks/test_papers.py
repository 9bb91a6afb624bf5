"""The papers' tables: how a rate is chosen, and what lm-eval is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.papers.judging import TASK, LmEval, write_task
from benchmarks.papers.reproduction import DICTIONARY_TEST, DICTIONARY_TRAIN, Cell, choose_rates, write_data
from benchmarks.papers.service import Trained
from benchmarks.papers.tables import LOLORA, LORA_XS, TABLES


def test_the_rate_of_a_row_is_the_best_of_its_seeds_mean() -> None:
    losses = {0: (1.0, 3.0), 1: (1.5, 1.7), 2: (1.8, 1.9)}
    cells = [
        Cell(row, rate, seed, Trained(f"{row.name}-{rate}-{seed}", loss, 1.0))
        for row in LORA_XS.rows
        for rate, seeds in losses.items()
        for seed, loss in enumerate(seeds)
    ]
    chosen = choose_rates(LORA_XS, cells)
    assert [[cell.trained.model for cell in row] for row in chosen] == [
        [f"{row.name}-1-0", f"{row.name}-1-1"] for row in LORA_XS.rows
    ]


def test_a_task_of_lm_eval_is_local_and_says_which_label_is_right(tmp_path: Path) -> None:
    _, test = write_data(LORA_XS, tmp_path)
    write_task(test, tmp_path)
    task = (tmp_path / f"{TASK}.yaml").read_text()
    data = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    answers = [json.loads(line)["messages"][-1]["content"] for line in test.read_text().splitlines()]

    assert f"test: {tmp_path / 'labels.jsonl'}" in task
    assert [line["labels"][line["label"]] for line in data] == answers
    assert all(line["labels"] == sorted(set(answers)) for line in data)


def test_the_dictionary_is_the_examples(tmp_path: Path) -> None:
    train, test = write_data(LOLORA, tmp_path)
    sizes = [len(path.read_text().splitlines()) for path in (train, test)]
    assert sizes == [DICTIONARY_TRAIN, DICTIONARY_TEST]


def test_an_environment_without_lm_eval_is_named(tmp_path: Path) -> None:
    judge = LmEval(Path(sys.executable), tmp_path)
    with pytest.raises(RuntimeError, match="lm-eval"):
        judge.accuracies("http://127.0.0.1:9/v1", "unused", ["tiny"], tmp_path)


def test_every_table_says_what_it_is() -> None:
    for table in TABLES.values():
        assert all((table.paper, table.table, table.protocol, table.scaled, table.claim, table.metric))
        assert len(table.rows) >= 3
