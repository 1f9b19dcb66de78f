"""x @ weight^T for many rows by cuBLASLt, with algorithms that were timed for their shapes instead
of the one its heuristic ranks first.

Knows the library's C interface (its names and numbers are those of cublasLt.h) and runs what it is
asked to: which algorithm is fastest is for others to find out. Every product has the one workspace,
so all must run on one stream. Where nothing was chosen, nothing is run.
"""

import contextlib
import ctypes
import functools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

TYPES: Final = {torch.bfloat16: 14, torch.float16: 2}
FLOAT32: Final = 0
COMPUTE_FLOAT32: Final = 68
TRANSPOSE_A = 3
TRANSPOSE_B = 4
WORKSPACE_LIMIT = 1
WORKSPACE: Final = 32 << 20
"""Bytes, as torch gives cuBLAS on Hopper."""
MOST: Final = 8
"""Algorithms asked for; the heuristic has seldom named more."""
FAR: Final = 2
"""An algorithm serves row counts down to this fraction of the one it was chosen for."""

Shape = tuple[int, int, torch.dtype]
"""(N, K, type) of a weight."""


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Found(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The one that torch has loaded; None where torch was built without CUDA."""
    try:
        return ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '').split('.')[0]}")
    except OSError:
        return None


def version() -> int:
    """Of the library; algorithms mean something to the version they come from alone. 0: there is no
    library."""
    library = _library()
    if library is None:
        return 0
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    return library.cublasLtGetVersion()


def _call(name: str, *arguments: object) -> None:
    """Raises RuntimeError when the library does not agree."""
    if status := getattr(_library(), name)(*arguments):
        raise RuntimeError(f"{name} failed with cuBLAS status {status}")


def _made(name: str, *arguments: object) -> ctypes.c_void_p:
    pointer = ctypes.c_void_p()
    _call(name, ctypes.byref(pointer), *arguments)
    return pointer


@functools.cache
def _handle() -> ctypes.c_void_p:
    return _made("cublasLtCreate")


@functools.cache
def _multiply() -> Callable[..., int]:
    """With its types, so that addresses may be plain integers."""
    function = getattr(_library(), "cublasLtMatmul")  # noqa: B009 - a function of the library, not of Python's
    function.argtypes = [*[ctypes.c_void_p] * 14, ctypes.c_size_t, ctypes.c_void_p]
    return function


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=device)


class Gemm:
    """[M, K] x [N, K]^T -> [M, N], all contiguous, as the library sees it: column-major, so the
    weight comes first."""

    def __init__(self, rows: int, shape: Shape) -> None:
        n, k, dtype = shape
        self._description = _made("cublasLtMatmulDescCreate", COMPUTE_FLOAT32, FLOAT32)
        for attribute, value in ((TRANSPOSE_A, 1), (TRANSPOSE_B, 0)):
            _call(
                "cublasLtMatmulDescSetAttribute",
                self._description,
                attribute,
                ctypes.byref(ctypes.c_int32(value)),
                ctypes.c_size_t(4),
            )
        layouts = [
            _made(
                "cublasLtMatrixLayoutCreate",
                TYPES[dtype],
                ctypes.c_uint64(height),
                ctypes.c_uint64(width),
                ctypes.c_int64(height),
            )
            for height, width in ((k, n), (k, rows), (n, rows))
        ]
        self._weight, self._x, self._out = layouts
        self._one = ctypes.c_float(1.0)
        self._zero = ctypes.c_float(0.0)

    def candidates(self) -> list[bytes]:
        """What the heuristic considers, best first; nothing where it knows nothing."""
        preference = _made("cublasLtMatmulPreferenceCreate")
        limit = ctypes.c_size_t(WORKSPACE)
        _call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference,
            WORKSPACE_LIMIT,
            ctypes.byref(limit),
            ctypes.c_size_t(8),
        )
        candidates = (_Found * MOST)()
        count = ctypes.c_int()
        layouts = self._weight, self._x, self._out, self._out
        with contextlib.suppress(RuntimeError):
            _call(
                "cublasLtMatmulAlgoGetHeuristic",
                _handle(),
                self._description,
                *layouts,
                preference,
                MOST,
                candidates,
                ctypes.byref(count),
            )
        _call("cublasLtMatmulPreferenceDestroy", preference)
        return [bytes(entry.algorithm) for entry in candidates[: count.value] if entry.state == 0]

    def accepts(self, algorithm: bytes) -> bool:
        layouts = self._weight, self._x, self._out, self._out
        native_algorithm = _Algorithm.from_buffer_copy(algorithm)
        found = _Found()
        check = getattr(_library(), "cublasLtMatmulAlgoCheck")  # noqa: B009 - a function of the library, not of Python's
        status = check(
            _handle(),
            self._description,
            *layouts,
            ctypes.byref(native_algorithm),
            ctypes.byref(found),
        )
        return status == 0 and found.workspace <= WORKSPACE

    def bound(
        self, algorithm: bytes, device: torch.device
    ) -> Callable[[Tensor, Tensor, Tensor], None]:
        """run(x, weight, out) on the current stream, which raises RuntimeError when the algorithm
        cannot do it. All that does not change is made here, once: eager steps call it a hundred
        times each."""
        multiply = _multiply()
        handle = _handle()
        description = self._description
        native_algorithm = _Algorithm.from_buffer_copy(algorithm)
        a = self._weight
        b = self._x
        d = self._out
        one = ctypes.byref(self._one)
        zero = ctypes.byref(self._zero)
        chosen = ctypes.byref(native_algorithm)
        space = _workspace(device).data_ptr()

        def run(x: Tensor, weight: Tensor, out: Tensor) -> None:
            to = out.data_ptr()
            stream = torch.cuda.current_stream(device).cuda_stream
            if status := multiply(handle, description, one, weight.data_ptr(), a, x.data_ptr(), b, zero, to, d, to, d, chosen, space,
                    WORKSPACE, stream):  # fmt: skip
                raise RuntimeError(f"cublasLtMatmul failed with cuBLAS status {status}")

        return run


Run = Callable[[Tensor, Tensor, Tensor], None]
"""(x, weight, out): one matrix product on the current stream."""


class GemmAlgorithms:
    """Which algorithm the products with weights of a shape use, by row count: one for a process,
    filled when it starts, empty until then."""

    def __init__(self) -> None:
        self.by_shape: dict[Shape, list[tuple[int, bytes]]] = {}
        """Row counts in rising order; an empty algorithm leaves the product to torch."""
        self._plans: dict[tuple[int, Shape], Run | None] = {}
        self._recorded: dict[Shape, tuple[int, list[Tensor]]] | None = None

    def choose(self, shape: Shape, algorithms: Mapping[int, bytes]) -> None:
        """What products with weights of `shape` use from now on, by row count; an empty algorithm
        leaves them to torch."""
        self.by_shape[shape] = sorted(algorithms.items())
        self._plans.clear()

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """x [M, K] @ weight [N, K]^T -> [M, N]; None where torch is to do it."""
        shape = (weight.shape[0], weight.shape[1], weight.dtype)
        if self._recorded is not None:
            self._recorded.setdefault(shape, (x.shape[0], []))[1].append(weight)
            _workspace(x.device)  # not from the memory of a graph that is captured later
        if shape not in self.by_shape or not x.is_contiguous():
            return None
        key = (x.shape[0], shape)
        if key not in self._plans:
            self._plans[key] = self._plan(*key, x.device)
        if (plan := self._plans[key]) is None:
            return None
        out = torch.empty(x.shape[0], shape[0], dtype=x.dtype, device=x.device)
        plan(x, weight, out)
        return out

    def _plan(self, rows: int, shape: Shape, device: torch.device) -> Run | None:
        """That of the next larger row count."""
        table = self.by_shape[shape]
        at = bisect_left(table, (rows, b""))
        if at == len(table) or table[at][0] > FAR * rows or not table[at][1]:
            return None
        gemm = Gemm(rows, shape)
        return gemm.bound(table[at][1], device) if gemm.accepts(table[at][1]) else None

    @contextlib.contextmanager
    def recording(self) -> Iterator[dict[Shape, tuple[int, list[Tensor]]]]:
        """What `matmul` is asked for meanwhile: by shape, the first row count and the weights."""
        self._recorded = {}
        try:
            yield self._recorded
        finally:
            self._recorded = None
