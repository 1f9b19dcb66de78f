"""The router of one row in one launch, against norm, product and choice one by one, in Triton's
interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.test_triton_moe import ROUTINGS
from ops.triton_cases import error
from pagewire_kernels import reference
from pagewire_kernels.moe_router import route
from pagewire_kernels.moe_row_router import norm_route, pick_warps
from pagewire_kernels.norm import rms_norm
from pagewire_kernels.routing import NO_EXPERT, Routing
from pagewire_kernels.workspace import counters
from torch import Tensor

TYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5
SUM_ERROR = 5e-7
"""Of float32 sums, as a part of the largest logit."""


def router(experts: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [1, H], the norm's weight [H] and the router's [E, H]: such that logits are rounded alike
    whatever the order of their sums."""
    while True:
        x = (torch.randn(1, hidden) * 2).to(dtype)
        norm = (torch.rand(hidden) + 0.5).to(dtype)
        weight = (torch.randn(experts, hidden) * hidden**-0.5).to(dtype)
        logits = rms_norm(x, norm, EPS).double() @ weight.double().T
        near = SUM_ERROR * logits.abs().max()
        if dtype == torch.float32 or (logits - near).to(dtype).equal((logits + near).to(dtype)):
            return x, norm, weight


def one_by_one(
    x: Tensor, norm: Tensor, weight: Tensor, routing: Routing, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, ids, weights) with a kernel for the norm, a product whose sums are float64, and a
    kernel for the choice."""
    normed = rms_norm(x, norm, EPS)
    logits = (normed.double() @ weight.double().T).to(x.dtype)
    return normed, *route(logits, routing, bias, torch.tensor([3]))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_same_experts_as_one_by_one(name: str, dtype: torch.dtype) -> None:
    routing, corrected = ROUTINGS[name]
    bias = torch.randint(-3, 4, (routing.num_experts,)) / 8 if corrected else None
    x, norm, weight = router(routing.num_experts, 96, dtype)
    normed, ids, weights = one_by_one(x, norm, weight, routing, bias)
    out = norm_route(x, norm, EPS, weight, routing, bias, torch.tensor([3]))
    assert out.normed.equal(normed)
    assert out.top_k_ids.dtype == torch.int32 and out.top_k_ids.equal(ids)
    torch.testing.assert_close(out.top_k_weights, weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 2), (60, 4), (128, 8), (160, 6)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_sizes_of_models(experts: int, top_k: int, renormalize: bool, dtype: torch.dtype) -> None:
    """Twice: the counter is left at zero."""
    routing = Routing(experts, top_k, renormalize=renormalize)
    x, norm, weight = router(experts, 80, dtype)
    _, ids, weights = one_by_one(x, norm, weight, routing)
    for _ in range(2):
        out = norm_route(x, norm, EPS, weight, routing)
        assert out.top_k_ids.equal(ids)
        torch.testing.assert_close(out.top_k_weights, weights, atol=1e-6, rtol=1e-5)
        assert counters(x.device, "router of one row", 1)[0] == 0


@pytest.mark.parametrize("dtype", TYPES)
def test_equal_logits_go_to_the_lowest_ids(dtype: torch.dtype) -> None:
    routing = Routing(60, 4, renormalize=True)
    x, norm, weight = router(60, 64, dtype)
    weight[:] = weight[0]
    weight[[7, 21, 50]] = x * 2
    out = norm_route(x, norm, EPS, weight, routing)
    assert out.top_k_ids.tolist() == [[7, 21, 50, 0]]


@pytest.mark.parametrize("warps", [1, 4])
def test_against_the_oracles(warps: int) -> None:
    routing = Routing(20, 3)
    x, norm, weight = router(20, 100, torch.float32)
    normed = reference.rms_norm(x, norm, EPS)
    ids, weights = reference.route(normed @ weight.T, routing)
    out = norm_route(x, norm, EPS, weight, routing, warps=warps)
    assert error(out.normed, normed) < 1e-6
    assert out.top_k_ids.equal(ids) and error(out.top_k_weights, weights) < 1e-5


def test_padding_chooses_no_expert() -> None:
    x, norm, weight = router(8, 64, torch.bfloat16)
    out = norm_route(x, norm, EPS, weight, Routing(8, 2), slot_mapping=torch.tensor([-1]))
    assert out.top_k_ids.eq(NO_EXPERT).all() and out.top_k_weights.eq(0).all()


def test_logits_that_are_no_numbers_give_valid_ids_and_weights_of_nan() -> None:
    x, norm, weight = router(8, 64, torch.bfloat16)
    weight[4] = float("nan")
    out = norm_route(x, norm, EPS, weight, Routing(8, 2))
    assert out.top_k_ids.ge(0).all() and out.top_k_ids.lt(8).all()
    assert out.top_k_weights.isnan().all()


def test_other_rows_and_experts_are_refused() -> None:
    x, norm, weight = router(8, 64, torch.float32)
    with pytest.raises(ValueError, match="takes one row and 8 experts"):
        norm_route(x.expand(2, -1), norm, EPS, weight, Routing(8, 2))
    with pytest.raises(ValueError, match="takes one row and 9 experts"):
        norm_route(x, norm, EPS, weight, Routing(9, 2))


def test_few_warps_share_a_row_where_the_choice_is_among_many() -> None:
    assert pick_warps(4096, 8) == 8
    assert [pick_warps(block, 128) for block in (64, 2048, 4096, 8192)] == [1, 1, 2, 4]


COMPILED = (
    (128, 8, 2048, 768, "bfloat16", "softmax"),
    (8, 2, 4096, 14336, "bfloat16", "softmax"),
    (128, 8, 4096, 1536, "float16", "softmax"),
    (256, 8, 7168, 2048, "bfloat16", "groups"),
)


def test_the_kernels_of_one_row_compile_for_hopper_without_spills(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = Path(__file__).with_name("compile_moe_row.py")
    finished = subprocess.run(
        [sys.executable, str(program), json.dumps(COMPILED)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    kernels = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(kernels) == 3 * len(COMPILED)
    for kernel in kernels:
        assert kernel["spilled"] == 0 and kernel["waits"] == 1, kernel
