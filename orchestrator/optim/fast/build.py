"""Compile layerwise.cpp once per machine with torch's extension tools, and load it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("layerwise.cpp")
HEADER = SOURCE.with_name("vector.h")
_FLAGS = ("-O3", "-std=c++17", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math")
_VECTOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}


@dataclass(frozen=True)
class Kernel:
    """The compiled functions, or why there are none.

    Attributes:
        functions: `lowtide_adam` and `lowtide_lars`; None where they could not be built.
        reason: why not, in a sentence; empty where they were.
    """

    functions: ctypes.CDLL | None
    reason: str


@functools.cache
def kernel() -> Kernel:
    """The kernel for this machine's processor: from the folder `lowtide` beside torch.hub's, or built into it.

    The build takes a few seconds, once for each version of the source and kind of processor. It needs a C++
    compiler, ninja and setuptools. Where it fails, the reference steps in and the reason is logged once.
    """
    try:
        return Kernel(functions=_load(), reason="")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
        reason = f"{type(error).__name__}: {lines[-1].strip()[:200]}"
        logger.warning(
            "the optimizers' kernel cannot be built (%s); their slower reference runs instead. Install a C++ "
            "compiler and ninja, or choose implementation='reference'",
            reason,
        )
        return Kernel(functions=None, reason=reason)


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let torch find the ninja of this environment, also where the environment is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _load() -> ctypes.CDLL:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = _FLAGS + next((f for name, f in _VECTOR_FLAGS.items() if capability.startswith(name)), ())
    texts = (path.read_text(encoding="utf-8") for path in (SOURCE, HEADER))
    what = (*texts, *flags, platform.machine(), platform.system())
    name = f"lowtide_layerwise_{hashlib.sha256('|'.join(what).encode()).hexdigest()[:16]}"
    root = Path(torch.hub.get_dir()).with_name("lowtide")
    path = root / f"{name}.so"
    if not path.is_file():
        # Imported here: it loads setuptools, which only a build needs.
        from torch.utils import cpp_extension

        root.mkdir(parents=True, exist_ok=True)
        # Built aside and moved into place: no lock that a killed process could leave behind.
        with tempfile.TemporaryDirectory(dir=root) as folder, _ninja_on_path():
            cpp_extension.load(
                name=name,
                sources=[str(SOURCE)],
                extra_cflags=list(flags),
                build_directory=folder,
                is_python_module=False,
                with_cuda=False,
            )
            os.replace(Path(folder) / f"{name}.so", path)
    library = ctypes.CDLL(str(path))
    for function in (library.lowtide_adam, library.lowtide_lars):
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return library
