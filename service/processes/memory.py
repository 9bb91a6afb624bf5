"""Tune memory and threads of Python and the C library for processes that run for weeks."""

from __future__ import annotations

import ctypes
import gc
import sys

#: Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
#: Larger blocks are mapped, and return to the system when they are freed. By default glibc raises this limit
#: to 32 MB when the first large block is freed, and then keeps large blocks among the small ones.
LARGE_BYTES = 256 * 1024
#: How long a thread may keep Python's lock while the event loop waits for it. The loop waits after every
#: system call, ten times in a small request: Python's default of 5 ms would add 50 ms.
SWITCH_INTERVAL_S = 0.0005
#: The most arenas. By default each thread that allocates gets its own, and arenas share no free memory.
MAX_ARENAS = 2


def return_freed_memory() -> bool:
    """Make glibc return freed memory; False with another C library. Call it before the first thread
    starts."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = {
        _M_MMAP_THRESHOLD: LARGE_BYTES,
        _M_TRIM_THRESHOLD: LARGE_BYTES,
        _M_ARENA_MAX: MAX_ARENAS,
    }
    return all(mallopt(option, value) == 1 for option, value in options.items())


def favour_event_loop() -> None:
    """Avoid long pauses of the event loop. Call it when everything has been loaded.

    The garbage collector no longer visits the objects that exist now, most of which belong to imported
    modules: a full collection took 0.26 s, and began whenever requests had made a fourth as many objects.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
