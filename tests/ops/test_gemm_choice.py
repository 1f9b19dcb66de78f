"""The choice of algorithms for matrix products: what is timed, kept, found again and used. The
library is a stand-in; `pagewire bench kernels` holds the real one against an oracle."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pagewire.worker.gpu import gemm_autotune
from pagewire_kernels import gemm, gemm_cublaslt
from pagewire_kernels.gemm_cublaslt import GemmAlgorithms

SHAPE = (512, 64, torch.bfloat16)
SMALL = (128, 64, torch.bfloat16)
FAST, REFUSED = b"\1" * 64, b"\2" * 64


class Library:
    """In place of a Product: multiplies, and counts how often it did so by which algorithm."""

    ran: list[tuple[int, bytes]]

    def __init__(self, rows: int, shape: gemm_cublaslt.Shape) -> None:
        self._rows = rows

    def accepts(self, algorithm: bytes) -> bool:
        return algorithm != REFUSED

    def run(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, algorithm: bytes
    ) -> None:
        self.ran.append((self._rows, algorithm))
        torch.mm(x, weight.t(), out=out)

    def bound(
        self, algorithm: bytes, device: torch.device
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
        return lambda x, weight, out: self.run(x, weight, out, algorithm)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Library]]:
    Library.ran = []
    monkeypatch.setattr(gemm_cublaslt, "Gemm", Library)
    monkeypatch.setattr(gemm_cublaslt, "version", lambda: 130200)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (x)")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return Library


def weights(*shapes: gemm_cublaslt.Shape) -> list[torch.Tensor]:
    return [torch.randn(n, k, dtype=dtype) for n, k, dtype in shapes]


@pytest.fixture
def algorithms() -> GemmAlgorithms:
    return GemmAlgorithms()


def forward(
    algorithms: GemmAlgorithms, layers: list[torch.Tensor], head: torch.Tensor
) -> Callable[[], None]:
    """A step of 40 tokens, 12 of which are sampled."""

    def multiply(rows: int, weight: torch.Tensor) -> None:
        x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
        gemm.linear(x, weight, algorithms=algorithms)

    def run() -> None:
        for weight in layers:
            multiply(40, weight)
        multiply(12, head)

    return run


def choose(
    algorithms: GemmAlgorithms, monkeypatch: pytest.MonkeyPatch, fastest: Callable[..., bytes]
) -> list[tuple[int, gemm_cublaslt.Shape, int]]:
    """What was timed: row count, shape, number of weights to take turns over."""
    timed: list[tuple[int, gemm_cublaslt.Shape, int]] = []

    def timing(rows: int, shape: gemm_cublaslt.Shape, given: list[torch.Tensor]) -> bytes:
        timed.append((rows, shape, len(given)))
        return fastest(rows)

    monkeypatch.setattr(gemm_autotune, "fastest", timing)
    layers, head = weights(SHAPE, SHAPE, SMALL), weights((1024, 64, torch.bfloat16))[0]
    step = forward(algorithms, layers, head)
    gemms = gemm_autotune.record(algorithms, step)
    gemm_autotune.choose(algorithms, gemms, [16, 24, 4096], [16, 24], lambda fraction: None)
    return timed


def test_each_product_is_timed_for_the_rows_it_will_have_and_small_ones_are_not(
    algorithms: GemmAlgorithms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed = choose(algorithms, monkeypatch, lambda rows: FAST if rows == 24 else b"")
    head = (1024, 64, torch.bfloat16)
    assert timed == [(16, SHAPE, 2), (24, SHAPE, 2), (4096, SHAPE, 2), (16, head, 1), (24, head, 1)]
    kept = json.loads((tmp_path / "products-nvidia-h200-x--130200.json").read_text())
    assert (
        kept["24x512x64 bfloat16"] == FAST.hex()
        and kept["16x512x64 bfloat16"] == ""
        and len(kept) == 5
    )


def test_what_was_kept_is_used_without_timing(
    algorithms: GemmAlgorithms, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(algorithms, monkeypatch, lambda rows: FAST)
    algorithms.by_shape.clear()
    assert choose(algorithms, monkeypatch, lambda rows: b"") == []
    assert algorithms.by_shape[SHAPE][0] == (16, FAST)


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"16x512x64 bfloat16": "no"}', '{"16x512x64 bfloat16": 7}', "\xff"]
)
def test_a_file_that_makes_no_sense_is_made_anew(
    algorithms: GemmAlgorithms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    place = tmp_path / "products-nvidia-h200-x--130200.json"
    place.write_text(content, encoding="latin-1")
    assert (
        len(choose(algorithms, monkeypatch, lambda rows: FAST)) == 5
        and len(json.loads(place.read_text())) == 5
    )


def test_a_directory_that_cannot_be_written_costs_the_file_alone(
    algorithms: GemmAlgorithms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    choose(algorithms, monkeypatch, lambda rows: FAST)
    assert algorithms.by_shape[SHAPE]


def test_what_does_not_fit_into_memory_is_left_to_torch(
    algorithms: GemmAlgorithms, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(rows: int) -> bytes:
        if rows == 4096:
            raise torch.OutOfMemoryError("no room")
        return FAST

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert len(choose(algorithms, monkeypatch, full)) == 5
    assert algorithms.by_shape[SHAPE] == [(16, FAST), (24, FAST), (4096, b"")]


def test_without_the_library_nothing_is_done(
    algorithms: GemmAlgorithms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_cublaslt, "version", lambda: 0)
    assert choose(algorithms, monkeypatch, lambda rows: FAST) == [] and not algorithms.by_shape


@pytest.mark.parametrize(
    ("rows", "used"),
    [
        (24, [(24, FAST)]),
        (20, [(20, FAST)]),
        (13, [(13, FAST)]),
        (11, []),
        (30, []),
        (2100, [(2100, FAST)]),
        (5000, []),
        (9000, []),
    ],
)
def test_a_product_takes_the_algorithm_of_the_next_larger_row_count_that_is_near(
    algorithms: GemmAlgorithms, rows: int, used: list[tuple[int, bytes]]
) -> None:
    algorithms.choose(SHAPE, {24: FAST, 60: b"", 4000: FAST, 8000: REFUSED})
    weight, x = weights(SHAPE)[0], torch.randn(rows, 64).bfloat16()
    torch.testing.assert_close(gemm.linear(x, weight, algorithms=algorithms), x @ weight.t())
    gemm.linear(x, weight, algorithms=algorithms)
    assert Library.ran == used * 2


def test_a_bias_and_strided_rows_are_left_to_torch(algorithms: GemmAlgorithms) -> None:
    algorithms.choose(SHAPE, {24: FAST})
    weight, x, bias = (
        weights(SHAPE)[0],
        torch.randn(24, 128).bfloat16(),
        torch.randn(512).bfloat16(),
    )
    gemm.linear(x[:, :64].contiguous(), weight, bias, algorithms)
    gemm.linear(x[:, :64], weight, algorithms=algorithms)
    assert not Library.ran


@pytest.mark.parametrize(
    ("ours", "torchs", "chosen"), [(97.0, 100.0, FAST), (99.0, 100.0, b""), (120.0, 100.0, b"")]
)
def test_an_algorithm_must_be_clearly_faster(ours: float, torchs: float, chosen: bytes) -> None:
    assert gemm_autotune.best({b"": torchs, FAST: ours, REFUSED: 130.0}) == chosen


def test_a_wrong_algorithm_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(
        self: Library, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, algorithm: bytes
    ) -> None:
        if algorithm == REFUSED:
            raise RuntimeError("cannot")
        torch.mm(x, weight.t(), out=out)
        if algorithm != FAST:
            out[-1] = float("nan")

    monkeypatch.setattr(gemm_autotune, "Gemm", Library)
    monkeypatch.setattr(
        Library, "candidates", lambda self: [b"\3" * 64, REFUSED, FAST], raising=False
    )
    monkeypatch.setattr(Library, "run", run)
    monkeypatch.setattr(
        gemm_autotune,
        "_times",
        lambda runs, weights: {algorithm: -float(i) for i, algorithm in enumerate(runs)},
    )
    assert gemm_autotune.fastest(50, SHAPE, weights(SHAPE)) == FAST
