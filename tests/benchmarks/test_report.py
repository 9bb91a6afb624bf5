"""The record that every benchmark writes."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report import save


def test_a_record_holds_no_path_of_the_machine(tmp_path: Path) -> None:
    model = tmp_path / "some-model"
    model.mkdir()
    path = tmp_path / "x.json"
    arguments = {"model": str(model), "out": model, "hub": "owner/name", "batch": [1], "json": path}
    save(path, question="?", arguments=arguments, rows=[])
    text = path.read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["arguments"] == {
        "model": "some-model", "out": "some-model", "hub": "owner/name", "batch": [1],
    }  # fmt: skip
