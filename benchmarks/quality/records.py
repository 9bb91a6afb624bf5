"""What the benchmark writes down: one JSON object per line, as soon as it is known.

kind "run": one training. "build": one basis or set of initial factors. "base": the untrained model. "probe":
figures of `probes`. "task": a finished piece of work.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tessera.errors import InvalidInput

#: Points of a stored training curve, each the mean over its part of the steps.
CURVE_POINTS = 40


@dataclass(frozen=True)
class RunRecord:
    """One training. loss: on the validation part after the last step, None if not finite.

    case: "lora_xs" (r x r), "lora:pissa" (LoRA form), "peft:pissa" (PEFT). train_curve: [step, mean loss]; in
    the first epoch every batch is new, so it is a held-out curve there. valid_curve: [step, loss].
    """

    data: str
    case: str
    rank: int
    seed: int
    rate: float
    loss: float | None
    parameters: int
    train_curve: list[list[float]] = field(default_factory=list)
    valid_curve: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class BuildRecord:
    """How a basis, or the factors of a LoRA form, came about. peak_bytes: on a GPU, above what was there.

    gain: of the basis' preconditioner (`BasisKind`). notes: those of the recipe, their medians over modules.
    """

    data: str
    case: str
    rank: int
    seconds: float
    peak_bytes: int | None = None
    gain: float | None = None
    notes: dict[str, float] = field(default_factory=dict)


class RecordFile:
    """Appends records, each flushed, so that what was measured survives whatever ends the process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def add(self, kind: str, record: Any) -> None:
        fields = record if isinstance(record, dict) else asdict(record)
        self._file.write(json.dumps({"kind": kind, **finite(fields)}, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """All records of a run, of all its processes. A last line that was cut off is passed over."""
    for path in sorted(folder.glob("records-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def take_over(earlier: Path, folder: Path, *, settings: dict[str, Any]) -> dict[str, Any]:
    """Copy the records of an earlier run into a folder; its hardware.

    earlier: with run.json and records-*.jsonl or records.jsonl.gz. Raises `InvalidInput` for other settings;
    those that it does not know are new.
    """
    run = json.loads((earlier / "run.json").read_text(encoding="utf-8"))
    measured = {**json.loads(json.dumps(settings)), **run["settings"]}
    apart = [name for name, value in json.loads(json.dumps(settings)).items() if measured[name] != value]
    if apart:
        raise InvalidInput(f"the records of {earlier.name} have other settings: {', '.join(apart)}")
    archive = earlier / "records.jsonl.gz"
    lines = [json.dumps(record, separators=(",", ":")) for record in read_records(earlier)]
    if archive.exists():
        lines += gzip.decompress(archive.read_bytes()).decode("utf-8").splitlines()
    (folder / "records-earlier.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    hardware: dict[str, Any] = run["hardware"]
    return hardware


def finite(value: Any) -> Any:
    """The same with six digits, and None for numbers that are not finite: a diverged run is one."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def shortened(losses: list[float], points: int = CURVE_POINTS) -> list[list[float]]:
    """[step, mean loss] of at most `points` equal parts."""
    size = max(1, math.ceil(len(losses) / points))
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [[i * size + len(part), sum(part) / len(part)] for i, part in enumerate(parts)]
