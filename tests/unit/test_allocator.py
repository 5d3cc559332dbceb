"""Where large tensors lie in the CPU's memory: seen from the system, in a process of its own."""

import os
import subprocess
import sys

import pytest

from distprune import allocator

KEPT = """
from distprune import allocator
allocator.prepare()
import psutil, torch
torch.ones(2**20)  # freed: from here on the C library would keep pieces of this size
before = psutil.Process().memory_info().rss
rows = []
for _ in range(50):
    rows += [torch.ones(2**19), torch.ones(2**10)]
small = rows[1::2]  # each holds the heap below it
del rows
print((psutil.Process().memory_info().rss - before) >> 20)
"""


def mib_kept(switch: str) -> int:
    environment = os.environ | {allocator.SWITCH: switch}
    done = subprocess.run([sys.executable, "-c", KEPT], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not allocator._has_huge_pages(), reason="this system has no huge pages")
def test_large_tensors_go_back_to_the_system_when_they_are_freed() -> None:
    assert mib_kept("1") < 10, "50 tensors of 2 MiB were freed"


@pytest.mark.slow
def test_the_switch_of_torch_puts_it_off() -> None:
    assert mib_kept("0") > 90


def test_a_system_without_huge_pages_keeps_its_ways(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(allocator, "_HUGE_PAGES", tmp_path / "enabled")
    assert not allocator._has_huge_pages()
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert not allocator._has_huge_pages()
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert allocator._has_huge_pages()
