"""The machine code: compiled once, kept in the user's cache, and done without where it is not to be had."""

import ctypes
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from distprune.pruning import native

COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
needs_a_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def load() -> ctypes.CDLL | None:
    """Load the library as a new process does."""
    return native.library.__wrapped__()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder, not there yet, of a user who has compiled nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache" / f"distprune-native-{os.getuid()}"


@needs_a_compiler
def test_where_there_is_a_compiler_the_machine_code_is_used() -> None:
    assert native.library() is not None, "the other tests would pass on NumPy alone"


@needs_a_compiler
def test_it_is_compiled_into_the_cache_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load() is not None
    (file,) = cache.iterdir()
    assert file == native._compiled()
    monkeypatch.setenv("CC", "false")
    assert load() is not None, "it is compiled again"


@needs_a_compiler
def test_other_code_options_or_cpus_have_another_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native._compiled()
    with monkeypatch.context() as patch:
        patch.setattr(native, "_OPTIONS", ["-O1", "-shared", "-fPIC"])
        native._compiled()
    with monkeypatch.context() as patch:
        patch.setattr(native.platform, "machine", lambda: "another")
        native._compiled()
    with monkeypatch.context() as patch:
        source = tmp_path / "changed.c"
        source.write_text(native._SOURCE.read_text() + "// changed\n")
        patch.setattr(native, "_SOURCE", source)
        native._compiled()
    with monkeypatch.context() as patch:
        read = Path.read_text
        flags = {"/proc/cpuinfo": "flags\t\t: of another kind of processor"}
        patch.setattr(Path, "read_text", lambda path, *rest: flags.get(str(path)) or read(path, *rest))
        native._compiled()
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc"])
def test_without_a_working_compiler_there_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CC", compiler)
    assert load() is None
    assert not list(cache.glob("*")), "something half done is left"


def test_without_any_compiler_there_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache))
    assert load() is None


def test_without_a_place_to_write_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load() is None


def test_a_user_without_a_home_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", no_home)
    assert load() is None


@needs_a_compiler
def test_a_file_that_is_no_library_is_done_without(cache: Path) -> None:
    native._compiled().write_bytes(b"half of it")
    assert load() is None


@needs_a_compiler
def test_ranks_that_compile_at_once_leave_one_good_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler starts its work when both have called it."""
    script = tmp_path / "cc"
    begun = f'echo >"{tmp_path}/begun.$$"; n=0; while [ $(ls {tmp_path}/begun.* | wc -l) -lt 2 ] && [ $n -lt 200 ]'
    script.write_text(f'#!/bin/sh\n{begun}; do sleep 0.05; n=$((n+1)); done\nexec {COMPILER} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with ThreadPoolExecutor(2) as pool:
        paths = [each.result() for each in [pool.submit(native._compiled) for _ in range(2)]]
    assert len(list(tmp_path.glob("begun.*"))) == 2
    assert list(cache.iterdir()) == [paths[0]] == [paths[1]]
    assert load() is not None


@needs_a_compiler
def test_a_histogram_writes_to_nothing_but_its_bins() -> None:
    library = native.library()
    assert library is not None
    counts, keys = torch.zeros(9, dtype=torch.int64), torch.arange(20, dtype=torch.int32)
    library.histogram(native.address(keys), 20, 5, 0, 4, native.address(counts[2:]))
    assert counts.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]
