"""What cuBLASLt is handed: each call's structures, by a stand-in for the library that reads and
writes them as cublasLt.h describes."""

import ctypes
from typing import Any

import pytest
import torch
from pagewire_kernels import gemm_cublaslt
from pagewire_kernels.gemm_cublaslt import MOST, WORKSPACE, Gemm

SHAPE = (512, 64, torch.bfloat16)
SUCCESS, NOT_SUPPORTED = 0, 15
NAMED = 3


class Native(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def pointed_to(reference: Any) -> int:
    """The address behind what is passed as a pointer."""
    return ctypes.cast(reference, ctypes.c_void_p).value or 0


class Library:
    """Names NAMED algorithms, the second of which it does not support; checks any of them."""

    def __init__(self, workspace: int, status: int = SUCCESS) -> None:
        self.workspace = workspace
        self.status = status
        self.checked: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cublasLt"):
            raise AttributeError(name)
        return lambda *arguments: SUCCESS

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        *_, most, results, count = arguments
        assert most == MOST
        for i in range(NAMED):
            result = Native.from_address(pointed_to(results) + i * ctypes.sizeof(Native))
            result.algorithm[0] = i + 1
            result.state = NOT_SUPPORTED if i == 1 else SUCCESS
        ctypes.c_int.from_address(pointed_to(count)).value = NAMED
        return SUCCESS

    def cublasLtMatmulAlgoCheck(self, *arguments: Any) -> int:
        *_, c, out, algorithm, result = arguments
        assert c is out
        self.checked.append(ctypes.string_at(pointed_to(algorithm), 64))
        # A structure of another size would be written past its end.
        assert ctypes.sizeof(result._obj) == ctypes.sizeof(Native)
        Native.from_address(pointed_to(result)).workspace = self.workspace
        return self.status


def gemm(monkeypatch: pytest.MonkeyPatch, library: Library) -> Gemm:
    monkeypatch.setattr(gemm_cublaslt, "_library", lambda: library)
    gemm_cublaslt._handle.cache_clear()
    try:
        return Gemm(256, SHAPE)
    finally:
        gemm_cublaslt._handle.cache_clear()


def test_the_heuristics_algorithms_are_read_but_for_what_it_does_not_support(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidates = gemm(monkeypatch, Library(workspace=0)).candidates()
    assert [int.from_bytes(algorithm[:8], "little") for algorithm in candidates] == [1, 3]


@pytest.mark.parametrize(
    ("workspace", "status", "accepted"),
    [
        (0, SUCCESS, True),
        (WORKSPACE, SUCCESS, True),
        (WORKSPACE + 1, SUCCESS, False),
        (0, NOT_SUPPORTED, False),
    ],
)
def test_an_algorithm_is_accepted_if_the_library_takes_it_and_the_workspace_suffices(
    monkeypatch: pytest.MonkeyPatch, workspace: int, status: int, accepted: bool
) -> None:
    library = Library(workspace, status)
    algorithm = bytes(range(64))
    assert gemm(monkeypatch, library).accepts(algorithm) is accepted
    assert library.checked == [algorithm]
