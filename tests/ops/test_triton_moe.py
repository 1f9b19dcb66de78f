"""The router, the lists of grouped products and all paths through a mixture of experts, against
their oracles, in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from ops.moe_cases import MoeCase, choices, moe_case
from ops.triton_cases import error
from pagewire_kernels import cpu, moe, moe_rows, moe_shapes, reference
from pagewire_kernels.moe_router import align, route
from pagewire_kernels.moe_shapes import GroupedConfig, GroupedPair, PairConfig
from pagewire_kernels.routing import NO_EXPERT, Routing
from torch import Tensor

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
ROUTINGS = {
    "softmax": (Routing(12, 3), False),
    "renormalized": (Routing(128, 8, renormalize=True), False),
    "all": (Routing(5, 5), False),
    "one": (Routing(8, 1, scoring_func="sigmoid"), False),
    "sigmoid": (Routing(12, 3, scoring_func="sigmoid", routed_scaling_factor=2.5), False),
    "corrected": (Routing(12, 4, True, "sigmoid", 2.5), True),
    "groups": (Routing(24, 4, num_expert_group=6, topk_group=3), False),
    "corrected groups": (Routing(32, 5, True, "sigmoid", 1.5, 8, 4), True),
    "one group": (Routing(20, 3, num_expert_group=5, topk_group=1), False),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("routed", [route, cpu.route])
def test_router(name: str, routed: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """With padding, and with ties: logits are from a few values."""
    routing, corrected = ROUTINGS[name]
    bias = torch.randint(-3, 4, (routing.num_experts,)) / 8 if corrected else None
    for logits in (
        torch.randn(9, routing.num_experts) * 3,
        torch.randint(-2, 3, (9, routing.num_experts)).float(),
        torch.randn(9, routing.num_experts).bfloat16(),
    ):
        mapping = torch.tensor([5, 0, -1, 3, 9, 8, 7, -1, -1])
        ids, weights = routed(logits, routing, bias, mapping)
        assert ids.dtype == torch.int32 and weights.dtype == torch.float32
        wanted_ids, wanted_weights = reference.route(logits, routing, bias, mapping)
        assert ids.equal(wanted_ids)
        torch.testing.assert_close(weights, wanted_weights, atol=1e-6, rtol=1e-5)
        assert ids[2].eq(NO_EXPERT).all() and weights[2].eq(0).all()


def test_router_reads_rows_that_are_not_contiguous_and_has_no_padding_unless_told() -> None:
    wide = torch.randn(4, 40)
    routing = Routing(16, 2)
    ids, weights = route(wide[:, :16], routing)
    wanted_ids, wanted_weights = reference.route(wide[:, :16], routing)
    assert ids.equal(wanted_ids)
    torch.testing.assert_close(weights, wanted_weights)


@pytest.mark.parametrize("name", ["softmax", "corrected groups"])
def test_logits_that_are_no_numbers_give_valid_ids_and_weights_of_nan(name: str) -> None:
    routing, corrected = ROUTINGS[name]
    logits = torch.randn(3, routing.num_experts)
    logits[1, 4] = float("nan")
    bias = torch.zeros(routing.num_experts) if corrected else None
    ids, weights = route(logits, routing, bias)
    assert ids.ge(0).all() and ids.lt(routing.num_experts).all()
    assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 2, False, "softmax", 1.0, 4), "10 experts cannot be divided into 4 groups"),
        ((8, 2, False, "softmax", 1.0, 4, 5), "5 of 4 groups"),
        ((8, 3, False, "softmax", 1.0, 4, 1), "3 experts a token cannot be chosen among 2"),
        ((8, 9), "9 experts a token cannot be chosen among 8"),
    ],
)
def test_a_routing_that_makes_no_sense_is_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Routing(*sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 2, 4), (40, 3, 7), (300, 4, 6)])
@pytest.mark.parametrize("block_m", [16, 64])
def test_pairs_are_in_the_order_of_experts(tokens: int, k: int, experts: int, block_m: int) -> None:
    ids = choices(tokens, k, experts)
    if tokens > 1:
        ids[tokens // 2 :: 5] = NO_EXPERT
    aligned = align(ids, experts, block_m)
    flat = ids.flatten().long()
    order = flat.where(flat >= 0, experts).sort(stable=True).indices.int()
    assert aligned.order.equal(order)
    assert aligned.positions[order.long()].equal(torch.arange(tokens * k, dtype=torch.int32))
    counts = flat[flat >= 0].bincount(minlength=experts)
    assert aligned.ends.equal(counts.cumsum(0).int())
    tiles = [tile for tile in aligned.tiles.T.tolist() if tile[0] != NO_EXPERT]
    wanted = []
    for expert, (count, end) in enumerate(zip(counts.tolist(), aligned.ends.tolist(), strict=True)):
        wanted += [[expert, first, end] for first in range(end - count, end, block_m)]
    assert tiles == wanted


def test_wrong_sizes_of_tiles_are_refused() -> None:
    small, large = GroupedConfig(16, 64, 64, 4, 2, True), GroupedConfig(32, 64, 64, 4, 2, True)
    with pytest.raises(ValueError, match="16 rows for one and 32"):
        GroupedPair(small, large)


def check(case: MoeCase, out: Tensor) -> None:
    assert out.shape == case.x.shape and out.dtype == case.x.dtype
    padding = case.top_k_ids.lt(0).all(1)
    assert out[padding].eq(0).all()
    assert error(out[~padding], case.exact()[~padding]) < TOLERANCES[out.dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "hidden", "inner"),
    [
        (1, 5, 2, 32, 24),
        (2, 9, 5, 48, 6),
        (7, 5, 3, 64, 18),
        (8, 4, 2, 32, 24),
        (9, 6, 2, 72, 40),
        (40, 5, 1, 64, 72),
    ],
)
def test_experts(
    dtype: torch.dtype, tokens: int, experts: int, k: int, hidden: int, inner: int
) -> None:
    case = moe_case(tokens, experts, k, hidden, inner, dtype, padding=tokens // 3)
    x, gate_up, down, ids, weights = case.inputs
    packed = moe.pack_experts(gate_up), moe.pack_experts(down)
    out = moe.experts(x, *packed, ids, weights)
    check(case, out)
    assert moe.experts(x, *packed, ids.long(), weights).equal(out)


def test_no_tokens_and_padding_alone() -> None:
    case = moe_case(3, 4, 2, 32, 24, padding=3)
    assert moe.experts(*case.inputs).eq(0).all()
    assert moe.grouped_experts(*case.inputs).eq(0).all()
    x, gate_up, down, ids, weights = case.inputs
    assert moe.experts(x[:0], gate_up, down, ids[:0], weights[:0]).shape == (0, 32)


@pytest.mark.parametrize(
    "shapes",
    [
        (PairConfig(4, 32, 1, 2), PairConfig(2, 64, 2, 3)),
        (PairConfig(16, 128, 4, 2, early=True), PairConfig(8, 16, 1, 1)),
    ],
)
def test_pairs_in_any_launch_shape(shapes: tuple[PairConfig, PairConfig]) -> None:
    case = moe_case(5, 6, 3, 80, 48, padding=1)
    x, gate_up, down, ids, weights = case.inputs
    inner = moe_rows.pair_up(x, gate_up, ids, config=shapes[0])
    check(case, moe_rows.token_down(inner, down, ids, weights, config=shapes[1]))


def test_pairs_with_the_residual_after() -> None:
    case = moe_case(3, 6, 2, 64, 40)
    residual = torch.randn(3, 64)
    out = moe_rows.experts_of_rows(*case.inputs, residual=residual)
    assert error(out, case.exact() + residual) < 1e-5


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize(
    ("block_m", "block_n", "block_k"), [(16, 64, 32), (32, 16, 64), (64, 32, 16)]
)
def test_groups_in_any_launch_shape(swap: bool, block_m: int, block_n: int, block_k: int) -> None:
    """An expert has several tiles of rows, the last of them partly filled."""
    case = moe_case(45, 3, 2, 80, 48, padding=4)
    config = GroupedConfig(block_m, block_n, block_k, 4, 2, swap)
    check(case, moe.grouped_experts(*case.inputs, shapes=GroupedPair(config, config)))


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    case = moe_case(30, 4, 2, 64, 40, torch.bfloat16)
    x, gate_up, down, ids, weights = case.inputs
    shapes = moe_shapes.swapped(16, 32, 2)
    whole = moe.grouped_experts(*case.inputs, shapes=shapes)
    some = torch.tensor([3, 7, 8, 21])
    part = moe.grouped_experts(x[some], gate_up, down, ids[some], weights[some], shapes=shapes)
    assert part.equal(whole[some])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_smaller_cards_get_shapes_that_fit_with_the_same_tiles(itemsize: int, gated: bool) -> None:
    from pagewire_kernels import shapes

    tables = [*moe_shapes.GROUPED.values(), moe_shapes.SMALL_CARDS]
    for pair in [entry for table in tables for _, entry in table]:
        best = pair.up if gated else pair.down
        for limit in (shapes.KIB_99, shapes.KIB_163, shapes.KIB_227):
            with shapes.pretend(limit):
                chosen = moe_shapes.choose(best, itemsize, gated).first(torch.device("cpu"))
            assert chosen.block_m == best.block_m
            assert moe_shapes.shared_bytes(chosen, itemsize, gated) <= limit
