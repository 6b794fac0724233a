"""What the C library does with memory that a step has freed: on a CPU it is time against size."""

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """
    Let the C library keep what is freed; call it before a framework is imported.

    XLA allocates the arrays of each step anew on a CPU, and PyTorch some. Given back to the
    operating system in between, every 4 KiB of them cost a page fault: a fifth of a step of a ViT
    in JAX on two cores. Kept, the process stays as large as it ever was, and may have grown by a
    few of its largest arrays. Results do not change.

    Returns:
        Whether the C library can: glibc, which is that of most Linux distributions.
    """
    # Never map an array by itself, never give memory back, and let all threads share one heap:
    # XLA's own are too small for its arrays.
    return _set((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1))


def return_freed_memory() -> bool:
    """
    Let the C library give back every array that is freed; call it before a framework is imported.

    The process is then as large as what is in use, without the holes of a heap: for a ViT a third
    less at its peak. Every array costs its page faults.

    Returns:
        As :func:`keep_freed_memory`.
    """
    return _set((_M_MMAP_THRESHOLD, 1 << 18))


def trim_freed_memory() -> None:
    """Give back, once, all that is free now: after :func:`keep_freed_memory`, between two jobs."""
    if hasattr(libc := _libc(), "malloc_trim"):
        libc.malloc_trim(0)


def _set(*options: tuple[int, int]) -> bool:
    libc = _libc()
    return hasattr(libc, "mallopt") and all([libc.mallopt(*option) == 1 for option in options])


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
