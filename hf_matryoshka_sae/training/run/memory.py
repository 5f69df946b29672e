"""How freed memory is kept for the next step."""

import ctypes
import sys


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed; return whether it was told.

    A training step on a CPU frees and allocates gradients of the size of the dictionary. By default glibc takes blocks
    above 32 MB from the system each time, which must fetch and clear every page: at 32,768 latents of width 768 that
    was a tenth of a step. The process then holds the most memory it ever needed until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST))
