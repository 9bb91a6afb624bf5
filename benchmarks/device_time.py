"""Time on the device: a CUDA graph between two events, so that no launch from Python is in the figure.

On a CPU, the clock. Also the bandwidth of a plain copy, the yardstick of everything that is bound by memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

#: Runs thrown away first: clocks, caches.
_WARM_UP = 3
#: Bytes of the copy, many times any cache.
_COPY_BYTES = {"cuda": 2 * 1024**3, "cpu": 64 * 1024**2}


def time_on_device(run: Callable[[], object], *, device: torch.device, repeats: int = 20) -> list[float]:
    """Seconds of each of `repeats` runs. On CUDA `run` is captured: it must launch the same work always."""
    if device.type != "cuda":
        return _time_on_cpu(run, repeats)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):  # compiles, allocates
        run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for index in range(_WARM_UP + repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize(device)
        if index >= _WARM_UP:
            times.append(began.elapsed_time(ended) / 1e3)
    return times


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by one plain elementwise copy."""
    source = torch.zeros(_COPY_BYTES[device.type] // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    times = time_on_device(lambda: torch.add(source, 0, out=target), device=device)
    return 2 * source.nbytes / sorted(times)[len(times) // 2]


def _time_on_cpu(run: Callable[[], object], repeats: int) -> list[float]:
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times
