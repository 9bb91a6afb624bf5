"""The benchmark of the host's time takes a step apart."""

from __future__ import annotations

from benchmarks.engine.host import host_row, parse_arguments


def test_the_parts_of_a_step() -> None:
    row = host_row(3, parse_arguments(["--context", "20", "--steps", "3", "--prefix-cache"]))
    assert (row["batch"], row["context"]) == (3, 20)
    assert all(row[f"{part}_ms"] > 0 for part in ("schedule", "advance", "collect", "deliver"))
