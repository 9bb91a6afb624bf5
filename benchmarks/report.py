"""Parts that all benchmarks share: timing by percentile, a record of the machine, a table, a JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

#: Runs that are discarded first, while allocator, caches and clocks settle.
WARM_UP = 2


def hardware() -> dict[str, Any]:
    """Return where a figure was measured: device, cores, versions."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measure(run: Callable[[], object], *, repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` runs, after WARM_UP runs that do not count."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(repeats):
        _synchronize()
        started = time.perf_counter()
        run()
        _synchronize()
        times.append(time.perf_counter() - started)
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """Return p20, p50 and p80 in milliseconds."""
    if len(times) == 1:
        return {name: round(times[0] * 1e3, 3) for name in ("p20_ms", "p50_ms", "p80_ms")}
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {name: round(cuts[i] * 1e3, 3) for name, i in (("p20_ms", 1), ("p50_ms", 4), ("p80_ms", 7))}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write = sys.stdout.write
    write("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n")
    for row in rows:
        write("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |\n")


def save(path: Path | None, *, question: str, arguments: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write question, arguments, hardware and rows to a JSON file, if a path is given.

    Only the last part of a path among the arguments is kept, because the rest belongs to that machine.
    """
    if path is None:
        return
    arguments = {name: _shown(value) for name, value in arguments.items() if name != "json"}
    record = {"question": question, "hardware": hardware(), "arguments": arguments, "rows": rows}
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")


def _shown(value: Any) -> Any:
    """Return an argument in the form in which it is recorded."""
    is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).is_dir())
    return Path(value).name if is_path else value


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
