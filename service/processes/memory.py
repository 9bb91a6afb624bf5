"""How Python and the C library treat memory and threads in processes that live for weeks."""

from __future__ import annotations

import ctypes
import gc
import sys

#: Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
#: Larger blocks are mapped, and go back to the system when they are freed. Unless it is told, glibc raises
#: this to 32 MB with the first large block that is freed, and keeps what follows among small blocks.
LARGE_BYTES = 256 * 1024
#: For so long may a thread keep Python's lock while the event loop waits for it, which it does after every
#: system call: ten times in a small request. Python's own 5 ms would make 50 of them.
SWITCH_INTERVAL_S = 0.0005
#: Each thread that allocates gets an arena of its own up to this number, none of which gives to another.
MAX_ARENAS = 2


def return_freed_memory() -> bool:
    """Ask glibc to give freed memory back; False where there is another C library. Call it before threads."""
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
    """Let nothing hold up the event loop for long that need not. Call it when all has been loaded.

    The collector leaves alone what is there now, above all the modules of transformers and torch: a full
    collection took 0.26 s, and began whenever requests had made a fourth as many objects.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
