"""What the C library keeps of freed memory: little, in processes that live for weeks."""

from __future__ import annotations

import ctypes

#: Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
#: Larger blocks are mapped, and go back to the system when they are freed. Unless it is told, glibc raises
#: this to 32 MB with the first large block that is freed, and keeps what follows among small blocks.
LARGE_BYTES = 256 * 1024
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
