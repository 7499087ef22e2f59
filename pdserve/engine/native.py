"""Builds the native kernels (kernels/) and calls the one of attention over a paged pool.

The sources are compiled once for this processor with the system's C++ compiler and kept on disk
under a name derived from sources, flags, compiler and processor; later starts load it from there.
It is loaded through ctypes, which releases the GIL during a call. It shares torch's own OpenMP
runtime: a second pool of spinning threads would fight the first for the cores.

Without a compiler ``load_native`` says why, and attention falls back to gathering.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pdserve.engine.compiler import Command, find_compiler, run_compiler, sole_builder
from pdserve.engine.layout import LayerSpan
from pdserve.engine.plan import StepPlan
from pdserve.engine.pool_view import PoolView
from pdserve.errors import ConfigError

FOLDER = Path(__file__).with_name("kernels")
SOURCE = FOLDER / "kernels.cpp"
ABI = 8
DTYPE_CODES: Mapping[torch.dtype, int] = {
    torch.bfloat16: 0,
    torch.float32: 1,
    torch.float64: 2,
}
# Sums may be reordered (that is what vectorizes them), but infinities and NaN keep their meaning.
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
)


class Layer(ctypes.Structure):
    _fields_ = (
        ("pool", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("key_offset", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_size", ctypes.c_int64),
        ("value_size", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("slot_blocks", ctypes.c_void_p),
        ("slot_offsets", ctypes.c_void_p),
        ("items", ctypes.c_int64),
        ("item_tokens", ctypes.c_void_p),
        ("item_rows", ctypes.c_void_p),
        ("item_contexts", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("query_head", ctypes.c_int64),
        ("query_token", ctypes.c_int64),
        ("key", ctypes.c_void_p),
        ("key_head", ctypes.c_int64),
        ("key_token", ctypes.c_int64),
        ("value", ctypes.c_void_p),
        ("value_head", ctypes.c_int64),
        ("value_token", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("query_heads", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


@dataclass(frozen=True, slots=True)
class NativeLoad:
    """A kernel, or the reason for none."""

    kernels: ctypes.CDLL | None
    reason: str


def native_supports(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype in DTYPE_CODES


class NativeStep:
    """One step's plan in the kernel's form; keeps the plan's arrays alive."""

    __slots__ = ("_plan", "struct")

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        self.struct = Step(
            tokens=plan.size,
            slot_blocks=plan.slot_blocks.ctypes.data,
            slot_offsets=plan.slot_offsets.ctypes.data,
            items=len(plan.short_tokens),
            item_tokens=plan.short_tokens.ctypes.data,
            item_rows=plan.short_rows.ctypes.data,
            item_contexts=plan.short_contexts.ctypes.data,
            tables=plan.tables.ctypes.data,
            table_stride=plan.tables.shape[1],
            threads=torch.get_num_threads(),
        )


def native_layer(pool: PoolView, span: LayerSpan) -> Layer:
    """Where a layer's KV lies; good for as long as the pool's memory."""
    return Layer(
        pool=pool.blocks.data_ptr(),
        block_stride=pool.layout.span_elements,
        key_offset=span.key_offset,
        value_offset=span.value_offset,
        heads=span.heads,
        key_size=span.key_size,
        value_size=span.value_size,
        block_size=pool.layout.block_size,
        dtype=DTYPE_CODES[pool.blocks.dtype],
    )


class NativeLayer:
    """The kernel bound to one layer of a pool."""

    __slots__ = ("_call", "_function", "_layer", "_pool")

    def __init__(self, library: ctypes.CDLL, pool: PoolView, span: LayerSpan) -> None:
        self._pool = pool  # keeps the memory alive that the kernel is given
        self._function = library.pdserve_paged_attention
        self._layer = native_layer(pool, span)
        self._call = _Call()

    def __call__(
        self,
        step: NativeStep,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> None:
        """Writes the step's KV, then attends its short rows into ``out``.

        query [H, T, key_size], key [heads, T, key_size], value [heads, T, value_size]: of the
        pool's dtype, last dimension contiguous. out: contiguous [T, H, value_size]. ``window`` and
        ``softcap``: 0 for none.
        """
        call = self._call
        call.query = query.data_ptr()
        call.query_head, call.query_token, _ = query.stride()
        call.key = key.data_ptr()
        call.key_head, call.key_token, _ = key.stride()
        call.value = value.data_ptr()
        call.value_head, call.value_token, _ = value.stride()
        call.out = out.data_ptr()
        call.query_heads = query.shape[0]
        call.window = window
        call.scale = scale
        call.softcap = softcap
        self._function(
            ctypes.byref(self._layer), ctypes.byref(step.struct), ctypes.byref(self._call)
        )


def load_native(cache_dir: Path, more_flags: tuple[str, ...] = ()) -> NativeLoad:
    """Loads the kernel for this machine from ``cache_dir``, building it first if need be.

    ``more_flags``: the compiler's; with them a kernel for another kind of processor can be tried.
    """
    openmp = _torch_openmp()
    flags = (*FLAGS, *more_flags, *(("-fopenmp",) if openmp else ()))
    try:
        compiler = find_compiler()
        if not compiler:
            return NativeLoad(None, "no C++ compiler (g++) was found")
        target = cache_dir / f"kernels-{_cache_key(compiler, flags)}.so"
        _own_folder(cache_dir)
        if not target.exists():
            with sole_builder(cache_dir):
                if not target.exists():
                    _build(compiler, flags, target)
        if openmp:
            # Already loaded by torch; this lends its symbols to the kernel.
            ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(target))
    except ConfigError as error:
        return NativeLoad(None, str(error))
    except OSError as error:
        return NativeLoad(None, f"the kernel could not be built or loaded: {error}")
    library.pdserve_paged_attention.restype = None
    library.pdserve_kernels_abi.restype = ctypes.c_int64
    library.pdserve_has_tiles.restype = ctypes.c_int64
    if library.pdserve_has_tiles():
        library.pdserve_input_bytes.restype = ctypes.c_int64
    found = library.pdserve_kernels_abi()
    assert found == ABI, f"{SOURCE.name} has ABI {found}, native.py expects {ABI}"
    return NativeLoad(library, "")


def _build(compiler: Command, flags: tuple[str, ...], target: Path) -> None:
    """Compiles next to ``target`` and renames, so that nobody ever loads half a file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        run_compiler([*compiler, *flags, "-c", str(SOURCE), "-o", str(compiled)])
        # Linked without -fopenmp: its symbols come from torch's runtime at load time.
        run_compiler([*compiler, "-shared", str(compiled), "-o", str(linked)])
        linked.rename(target)


def _own_folder(folder: Path) -> None:
    """Creates the folder; code is only ever loaded from one that nobody else can write to."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    info = folder.stat()
    if info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written to by other users")


def _cache_key(compiler: Command, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted(FOLDER.iterdir()):
        digest.update(source.read_bytes())
    for part in (*compiler, run_compiler([*compiler, "--version"]), " ".join(flags), _processor()):
        text = part.encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What -march=native depends on: the cache may lie in a home shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = sorted(
        {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    )
    return "\n".join((platform.machine(), *features))


def _torch_openmp() -> str | None:
    """Path of the OpenMP runtime that torch loaded; None: the kernel runs on one thread."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            path = line.rsplit(maxsplit=1)[-1]
            if any(name in Path(path).name for name in ("libgomp", "libiomp5", "libomp")):
                return path
    return None
