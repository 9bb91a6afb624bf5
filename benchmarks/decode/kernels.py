"""Which kernels the time of a step goes to, read off the device's own trace of a replayed step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

#: Of a kernel's name, templates of libraries run to hundreds of characters.
_NAME_CHARS = 90
_REPEATS = 5
#: Longer pauses are those between two runs.
_PAUSE_US = 30.0


def kernel_times(run: Callable[[], object]) -> list[dict[str, Any]]:
    """One row per kernel, the most expensive first: launches and microseconds a run. CUDA only.

    gap_us: between the end of the kernel before and this one's begin; less than 0 where they overlap.
    """
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(_REPEATS):
            run()
            torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name[:_NAME_CHARS])
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    times: dict[str, list[float]] = defaultdict(list)
    gaps: dict[str, float] = defaultdict(float)
    last_end = spans[0][0]
    for start, end, name in spans:
        times[name].append(end - start)
        if start - last_end < _PAUSE_US:
            gaps[name] += start - last_end
        last_end = max(last_end, end)
    return [
        {
            "kernel": name,
            "launches": len(times[name]) / _REPEATS,
            "us": round(sum(times[name]) / _REPEATS, 1),
            "gap_us": round(gaps[name] / _REPEATS, 1),
        }
        for name in sorted(times, key=lambda name: -sum(times[name]))
    ]
