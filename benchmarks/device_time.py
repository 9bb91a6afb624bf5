"""Time on the device: a CUDA graph between two events, so that the figure includes no launch from Python.

On a CPU it is wall-clock time. The bandwidth of a plain copy, also measured here, is the yardstick for
everything that is bound by memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

#: Runs that are discarded first, while clocks and caches settle.
_WARM_UP = 3
#: Bytes of the copy, many times the size of any cache.
_COPY_BYTES = {"cuda": 2 * 1024**3, "cpu": 64 * 1024**2}


def time_on_device(run: Callable[[], object], *, device: torch.device, repeats: int = 20) -> list[float]:
    """Return the seconds of each of `repeats` runs.

    On CUDA `run` is captured as a graph, so it must always launch the same work.
    """
    return time_in_turn([run], device=device, rounds=repeats)[0]


def time_in_turn(
    runs: Sequence[Callable[[], object]], *, device: torch.device, rounds: int
) -> list[list[float]]:
    """Seconds of each run in each of `rounds` rounds through all of them, by run."""
    replays = [_captured(run, device) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for index in range(_WARM_UP + rounds):
        for replay, own in zip(replays, times, strict=True):
            seconds = _timed(replay, device)
            if index >= _WARM_UP:
                own.append(seconds)
    return times


def _captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A replay of what `run` launches; elsewhere than on CUDA `run` itself."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):  # compiles, allocates
        run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _timed(replay: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        replay()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by one plain elementwise copy."""
    source = torch.zeros(_COPY_BYTES[device.type] // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    times = time_on_device(lambda: torch.add(source, 0, out=target), device=device)
    return 2 * source.nbytes / sorted(times)[len(times) // 2]
