"""What does it cost to load adapters into slots? Host and device time, for several adapters at once.

    python -m benchmarks.engine.slot_loads [--modules 224] [--rank 16] [--repeats 20] [--json FILE]

Two ways are compared. The engine makes one copy per adapter, straight from its (pinned) host memory into its
slot. The other way gathers all adapters in one pinned buffer, makes one copy, and runs an `index_copy_` on
the device. `host_ms` is the time for which the engine's thread is busy; `total_ms` is the time until the
slots are loaded. Needs only torch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import print_table, save
from service.engine.adapters.packed_adapter import SlotFormat
from service.engine.adapters.slots import SlotLoads
from tessera.formats.adapter import Adapter

WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--modules", type=int, default=224, help="target modules; default: an 8B Llama, 32 layers of seven"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    packing = SlotFormat(torch.bfloat16, is_pinned=is_cuda)
    shape = (arguments.modules, arguments.rank, arguments.rank)
    largest = max(arguments.counts)
    adapters = [packing.pack(Adapter("00" * 32, torch.randn(shape))).R for _ in range(largest)]
    R_slots = torch.zeros(largest + 1, *shape, device=device, dtype=packing.dtype)
    rows = []
    for count in arguments.counts:
        for name, load in (("one by one", one_by_one(R_slots)), ("gathered", gathered(R_slots, largest))):
            row = timed(load, adapters[:count], repeats=arguments.repeats)
            rows.append({"adapters": count, "how": name, **row})
            assert all(torch.equal(R_slots[i + 1].cpu(), R) for i, R in enumerate(adapters[:count]))
            R_slots.zero_()
    print_table(rows)
    save(arguments.json, question=__doc__.splitlines()[0], arguments=vars(arguments), rows=rows)


def one_by_one(R_slots: Tensor) -> Callable[[list[Tensor]], None]:
    loads = SlotLoads(R_slots)

    def load(adapters: list[Tensor]) -> None:
        for slot, R in enumerate(adapters, start=1):
            loads.add(slot, R)
        loads.start()
        loads.wait()

    return load


def gathered(R_slots: Tensor, largest: int) -> Callable[[list[Tensor]], None]:
    buffer = torch.empty(largest, *R_slots.shape[1:], dtype=R_slots.dtype, pin_memory=R_slots.is_cuda)

    def load(adapters: list[Tensor]) -> None:
        count = len(adapters)
        torch.stack(adapters, out=buffer[:count])
        slots = torch.arange(1, count + 1, device=R_slots.device)
        R_slots.index_copy_(0, slots, buffer[:count].to(R_slots.device, non_blocking=True))

    return load


def timed(load: Callable[[list[Tensor]], None], adapters: list[Tensor], *, repeats: int) -> dict[str, Any]:
    host, total = [], []
    for turn in range(WARM_UP + repeats):
        _synchronize()
        started = time.perf_counter()
        load(adapters)
        launched = time.perf_counter()
        _synchronize()
        if turn >= WARM_UP:
            host.append(launched - started)
            total.append(time.perf_counter() - started)
    moved = sum(R.nbytes for R in adapters)
    seconds = statistics.median(total)
    return {
        "host_ms": round(statistics.median(host) * 1e3, 4),
        "total_ms": round(seconds * 1e3, 4),
        "gb_per_s": round(moved / seconds / 1e9, 2),
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
