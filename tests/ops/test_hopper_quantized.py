"""The product with matrices of 4 bits for Hopper GPUs: how it is shared out, when it is taken, that
it compiles as it must. `tests/worker/gpu_quantized.py` holds its results against an oracle."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from pagewire.worker.gpu import verify_hopper
from pagewire_kernels import cuda_quantized, gemm_quantized_hopper, hopper_plan
from pagewire_kernels.cuda_quantized import CudaQuantized
from pagewire_kernels.hopper_plan import (
    GROUP_ROWS,
    LEAST_ROWS,
    MOST_ROWS,
    HopperPlan,
    plan,
    takes_inputs,
)
from pagewire_kernels.kernel_choices import KernelChoices
from pagewire_kernels.quantized import quantize

SIZES = list(
    itertools.product(
        (65, 128, 129, 256, 384, 512, 768, 1000, 2048, 4096),
        (64, 448, 1024, 4096, 6144, 28672),
        (64, 512, 1088, 4096, 14336),
        (114, 132),
    )
)


def tiles_of(chosen: HopperPlan, rows: int, padded: int) -> tuple[int, int]:
    return -(-rows // chosen.rows), -(-padded // (chosen.groups * GROUP_ROWS))


def test_programs_that_wait_for_each_other_have_a_multiprocessor_each() -> None:
    seen = set()
    for rows, padded, columns, count in SIZES:
        chosen = plan(rows, padded, columns, count)
        seen.add((chosen.rows, min(chosen.splits, 2)))
        assert 1 <= chosen.programs <= count
        assert chosen.splits & (chosen.splits - 1) == 0
        assert chosen.rows * chosen.stages * 64 * 2 == 128 << 10
    assert seen == set(itertools.product((128, 256), (0, 1, 2)))


MATH = SimpleNamespace(
    minimum=min, maximum=max, where=lambda condition, yes, no: yes if condition else no
)


def in_python(name: str) -> Any:
    """A function of the kernel, run on plain integers."""
    code = getattr(gemm_quantized_hopper, name).fn.__code__
    return FunctionType(code, {"gl": MATH, "GROUP_M": 8})


def test_every_step_of_every_tile_is_computed_once_and_its_others_are_found() -> None:
    work_range, pieces, piece, place = map(in_python, ("_range", "_pieces", "_piece", "_place"))
    for rows, padded, columns, count in SIZES:
        chosen = plan(rows, padded, columns, count)
        tiles_m, tiles_n = tiles_of(chosen, rows, padded)
        tiles, steps, splits = tiles_m * tiles_n, columns // 64, chosen.splits
        ends: dict[tuple[int, int], int] = {}
        owners: dict[tuple[int, int], int] = {}
        for program in range(chosen.programs):
            cut = work_range(
                program, chosen.programs, tiles, chosen.whole, chosen.span, steps, splits
            )
            number = pieces(program, chosen.programs, tiles, chosen.whole, *cut, steps, splits)
            assert number >= 1
            for i in range(number):
                tile, first, last = piece(
                    i, program, chosen.programs, chosen.whole, *cut, steps, splits
                )
                assert 0 <= tile < tiles and 0 <= first < last <= steps
                # what others wait for comes first, so that none waits in a circle
                assert splits > 1 or first == 0 or i == chosen.whole
                assert (tile, first) not in ends
                ends[tile, first] = last
                owners[tile, first] = program
        for tile in range(tiles):
            at = 0
            while at < steps:
                before = owners[tile, at]
                at = ends[tile, at]
                # _add_others goes through the programs that follow
                assert at == steps or owners[tile, at] == before + 1
        assert sum(ends[at] - at[1] for at in ends) == tiles * steps
        places = {place(tile, tiles_m, tiles_n) for tile in range(tiles)}
        assert places == set(itertools.product(range(tiles_m), range(tiles_n)))


def looks_like(x: torch.Tensor, **other: Any) -> Any:
    """A tensor that claims to be on a GPU."""
    fields = {name: getattr(x, name) for name in ("shape", "dtype", "stride", "data_ptr")}
    return SimpleNamespace(**{**fields, "device": torch.device("cuda"), **other})


def test_what_the_kernel_lacks_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_plan, "_is_built_for", lambda device: True)
    x = torch.empty(MOST_ROWS + 1, 128, dtype=torch.bfloat16)
    assert takes_inputs(looks_like(x[:LEAST_ROWS])) and takes_inputs(looks_like(x[:MOST_ROWS]))
    assert not takes_inputs(x[:256])
    assert not takes_inputs(looks_like(x[: LEAST_ROWS - 1])) and not takes_inputs(looks_like(x))
    assert not takes_inputs(looks_like(x[:256].float()))
    assert not takes_inputs(looks_like(x[:256, :96]))
    assert not takes_inputs(looks_like(x[:256], data_ptr=lambda: 8))
    assert not takes_inputs(looks_like(torch.empty(256, 132, dtype=torch.bfloat16)[:, :128]))
    assert not takes_inputs(looks_like(x[:128].t()))


@pytest.mark.parametrize(
    ("release", "capability", "known"),
    [("3.6.0", (9, 0), True), ("3.7.1", (9, 0), False), ("3.6.2", (10, 0), False)],
)
def test_the_kernel_is_for_one_release_and_one_kind_of_gpu(
    monkeypatch: pytest.MonkeyPatch, release: str, capability: tuple[int, int], known: bool
) -> None:
    monkeypatch.setattr(hopper_plan.triton, "__version__", release)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    hopper_plan._is_built_for.cache_clear()
    assert hopper_plan._is_built_for(torch.device("cuda")) is known
    hopper_plan._is_built_for.cache_clear()


def plainly(
    x: torch.Tensor, matrix: Any, bias: torch.Tensor | None, out: torch.Tensor, wrong: float = 1.0
) -> None:
    out.copy_((x @ cuda_quantized.dequantize(matrix, x.dtype).T) * wrong)
    if bias is not None:
        out += bias


@pytest.mark.parametrize("enabled", [True, False])
def test_matrices_of_4_bits_go_there_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    taken: list[int] = []

    def noted(x: torch.Tensor, matrix: Any, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        taken.append(matrix.shape[0])
        plainly(x, matrix, bias, out)

    monkeypatch.setattr(hopper_plan, "takes_inputs", lambda x: True)
    monkeypatch.setattr(gemm_quantized_hopper, "hopper_linear", noted)
    choices = KernelChoices(hopper_quantized=enabled)
    parts = [quantize(torch.randn(rows, 128), bits) for rows, bits in ((64, 4), (32, 8), (48, 4))]
    matrices = CudaQuantized(choices).pack(parts, False)
    assert matrices is not None and choices.int4_groups == {(32, True)}
    x, bias = torch.randn(70, 128), torch.randn(144)
    weight = torch.cat([part.dequantize() for part in parts])
    exact = torch.nn.functional.linear(x, weight, bias)
    assert float((matrices(x, bias) - exact).norm() / exact.norm()) < 2e-3
    assert taken == ([64, 48] if enabled else [])


def comparisons(monkeypatch: pytest.MonkeyPatch, wrong: float | None) -> KernelChoices:
    def product(*arguments: Any) -> None:
        if wrong is None:
            raise RuntimeError("no such instruction")
        plainly(*arguments, wrong=wrong)

    monkeypatch.setattr(hopper_plan, "takes_inputs", lambda x: True)
    monkeypatch.setattr(gemm_quantized_hopper, "hopper_linear", product)
    monkeypatch.setattr(verify_hopper, "QUANTIZED_SHAPES", ((70, 64, 128),))
    choices = KernelChoices(int4_groups={(128, False), (32, True)})
    verify_hopper.check_quantized(choices, torch.float32, torch.device("cpu"))
    return choices


def test_a_kernel_that_agrees_with_the_general_one_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert comparisons(monkeypatch, 1.0).hopper_quantized and not caplog.records


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(1.1, "differ from the general kernel's by 0.1"), (float("nan"), "by inf"), (None, "no such")],
)
def test_a_kernel_that_is_wrong_or_fails_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: float | None,
    words: str,
) -> None:
    assert not comparisons(monkeypatch, wrong).hopper_quantized
    assert words in caplog.text and "4 bits for Hopper" in caplog.text


CASES = (
    (256, 28672, 4096, 128, False, "bfloat16"),
    (512, 28672, 4096, 128, False, "bfloat16"),
    (256, 4096, 4096, 64, False, "float16"),
    (128, 28672, 4096, 32, True, "bfloat16"),
    (128, 4096, 4096, 16, True, "float16"),
)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cache = tmp_path_factory.mktemp("kernels")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    program = Path(__file__).with_name("compile_hopper_quantized.py")
    finished = subprocess.run(
        [sys.executable, str(program), json.dumps(CASES)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return [json.loads(line) for line in finished.stdout.splitlines()]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_kernel_compiles(launches: list[dict[str, Any]], case: int) -> None:
    found = launches[case]
    assert found["shared"] <= 227 << 10
    # A product reads registers while it runs: it must have ended before they are written again.
    assert found["waits"] == [0]
    # Nor may the assembler put a wait behind each product, for want of registers.
    assert "wgmma" not in found["assembler"]
    # Groups of 16 take registers of their own for each word.
    assert found["spilled"] <= (32 if CASES[case][3] >= 32 else 128)


def test_a_release_of_triton_without_this_gluon_does_without_the_kernel() -> None:
    program = (
        "import sys; sys.modules['triton.experimental.gluon'] = None\n"
        "import pagewire_kernels.cuda, pagewire.worker.gpu.runner\n"
        "assert 'pagewire_kernels.gemm_quantized_hopper' not in sys.modules\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
