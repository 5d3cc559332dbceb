"""How a process holds large tensors in the CPU's memory. Free of torch: it must be called before torch allocates.

DeepSpeed allocates its buckets anew in every step, and the C library keeps what is freed, with gaps. From a huge page
on, every tensor gets memory of its own, in huge pages where Linux gives them, and gives it back: the first touch is
cheap, and nothing is kept. What this is worth stands in docs/performance.md.
"""

import ctypes
import os
from pathlib import Path

LARGE = 2 << 20
"""Bytes of a huge page, from which on torch asks for them."""
SWITCH = "THP_MEM_ALLOC_ENABLE"
"""torch's own; 0 in the environment puts all of this off."""
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""


def prepare() -> None:
    """Have large tensors lie in huge pages of their own, where the system has such pages."""
    if os.environ.setdefault(SWITCH, "1") != "1" or not _has_huge_pages():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)


def _has_huge_pages() -> bool:
    try:
        return "[never]" not in _HUGE_PAGES.read_text()
    except OSError:
        return False
