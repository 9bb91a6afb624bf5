"""A small table of `benchmarks/papers` through the whole service: train, choose, judge, clean up."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.papers.reproduction import Protocol, reproduce
from benchmarks.papers.service import Service
from benchmarks.papers.tables import LOLORA, LORA_XS
from tests.e2e.conftest import Stack


def test_a_table_is_reproduced_and_leaves_nothing(stack: Stack) -> None:
    before = {adapter.id for adapter in stack.client.models.list().data}
    said: list[str] = []
    rates = ({"learning_rate_multiplier": 1.0}, {"learning_rate_multiplier": 1e-6})
    table = replace(LORA_XS, rows=(LORA_XS.rows[-1], LOLORA.rows[0]), rates=rates)

    with Service(f"{stack.url}/v1", "unused") as service:
        found = reproduce(table, Protocol(service, "unused", [0], None, 600, report=said.append))

    base, *rows = found["rows"]
    assert [row["name"] for row in rows] == ["SVD of W", "HPCA (svd first)"]
    assert all(row["loss"] < base["loss"] - 0.5 for row in rows)
    assert all(row["rate"] == rates[0] for row in rows), "a rate of nearly 0 has the higher validation loss"
    assert len(said) == 4
    assert {adapter.id for adapter in stack.client.models.list().data} == before
