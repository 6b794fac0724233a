"""Memory that a step has freed, kept for the next one."""

import ctypes
import sys

# Numbers of glibc's malloc.h: never map an array by itself, never give memory back, and let all
# threads share one heap, or those of XLA map anew what does not fit into small heaps of their own.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """
    Let the C library keep what is freed; call it before a framework is imported.

    XLA allocates the arrays of each step anew on a CPU. Given back to the operating system in
    between, every 4 KiB of them cost a page fault: a fifth of a step of a ViT on two cores. Kept,
    the process stays as large as it ever was, and may have grown by a few of its largest arrays.
    Results do not change.

    Returns:
        Whether the C library can: glibc, which is that of most Linux distributions.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    options = (_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1)
    return all([libc.mallopt(name, value) == 1 for name, value in options])
