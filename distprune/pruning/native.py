"""The machine code of native.c: compiled at the first start on a kind of CPU, in a fifth of a second, and kept.

Without a C compiler, or a place to keep the result, NumPy does the same in more than twice the time; both are tested.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from ctypes import POINTER, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from torch import Tensor

_SOURCE = Path(__file__).with_name("native.c")
_OPTIONS = ["-O3", "-march=native", "-shared", "-fPIC"]
_ARGUMENTS = {
    "split": [c_void_p, c_int64, c_int32, c_int32, c_int64, c_void_p, c_void_p, c_int64, POINTER(c_int64)],
    "histogram": [c_void_p, c_int64, c_int32, c_int32, c_int64, c_void_p],
    "prune_below": [c_void_p, c_void_p, c_int64, c_int32, c_int32],
    "apply_mask_32": [c_void_p, c_void_p, c_int64],
    "apply_mask_16": [c_void_p, c_void_p, c_int64],
}


_NOT_TO_BE_HAD = (OSError, RuntimeError, subprocess.SubprocessError)
"""RuntimeError: a user without a home."""


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions of native.c; None where they are not to be had, which `why_none` explains."""
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except _NOT_TO_BE_HAD:
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, c_int64 if name in ("split", "prune_below") else None
    return loaded


def why_none() -> str | None:
    """Return why there are no compiled functions; None where there are."""
    try:
        _compiled()
    except _NOT_TO_BE_HAD as error:
        return str(error)
    return None if library() else "the compiled file cannot be loaded"


def address(tensor: Tensor) -> int:
    """Return where a contiguous tensor on the CPU begins."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()


def _compiled() -> Path:
    """Return the library for this CPU, compiled where it is missing.

    Raises:
        OSError: no compiler, or nowhere to write.
        subprocess.SubprocessError: the compiler failed.
    """
    folder = _folder()
    target = folder / f"{_identity()}.so"
    if not target.exists():
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
        if compiler is None:
            raise FileNotFoundError("no C compiler")
        with tempfile.TemporaryDirectory(dir=folder) as new:
            fresh = Path(new) / target.name
            command = [*compiler.split(), *_OPTIONS, "-o", str(fresh), str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            fresh.replace(target)  # at once: other ranks may be doing the same
    return target


def _folder() -> Path:
    """Return the folder of this user's libraries, which nobody else may write to or put another one in place of.

    Raises:
        OSError: it cannot be made, or somebody else may.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder, user = cache / f"distprune-native-{os.getuid()}", os.getuid()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    own, above = folder.lstat(), cache.stat()
    if not stat.S_ISDIR(own.st_mode) or own.st_uid != user or own.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to {folder}")
    if above.st_uid not in (user, 0) or (above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX):
        raise PermissionError(f"others may put another folder in place of {folder}")
    return folder


def _identity() -> str:
    """Return a digest of the code, the options and the CPU: nodes of a cluster may differ and share a home."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().split("\n\n")[0].splitlines() if cpu.exists() else []
    kind = [line for line in lines if line.split("\t")[0].strip() in ("model name", "flags", "Features")]
    return hashlib.sha256(repr((_SOURCE.read_text(), _OPTIONS, platform.machine(), kind)).encode()).hexdigest()[:16]
