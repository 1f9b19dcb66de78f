"""Slot state kernels against their references, in Triton's interpreter."""

import ast
from dataclasses import fields
from pathlib import Path
from typing import TypeGuard

import pagewire_kernels
import pytest
import torch
from pagewire_kernels.slot_state import (
    LAST_TOKEN,
    DecodeRows,
    SlotState,
    commit,
    commit_reference,
    decode_inputs,
    decode_inputs_reference,
    place_last_tokens,
    place_last_tokens_reference,
)

SLOTS, COLUMNS, BLOCK = 11, 2500, 16
POISON = -77
KERNELS = Path(pagewire_kernels.__file__).parent


def random_state(seed: int) -> SlotState:
    torch.manual_seed(seed)
    state = SlotState.empty(SLOTS, COLUMNS, "cpu")
    state.last_token.random_(0, 50_000)
    state.num_computed.random_(0, COLUMNS * BLOCK - 1)
    state.table.random_(0, 100_000)
    state.sampling_params.uniform_()
    state.seeds.random_()
    return state


def test_decode_inputs_with_padding_rows_and_long_tables():
    state = random_state(1)
    state.num_computed[3] = 0
    state.kept_token.fill_(POISON)
    slots = torch.tensor([7, -1, 3, 0, 10, -1], dtype=torch.int32)
    whole = DecodeRows.empty(9, COLUMNS, "cpu")
    for field in fields(whole):
        getattr(whole, field.name).fill_(POISON)
    out = whole.first(len(slots))
    decode_inputs(slots, state, BLOCK, out)
    expected = decode_inputs_reference(slots, state, BLOCK)
    for name in ("tokens", "positions", "mapping", "seq_lens"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    live = slots >= 0
    own = slots[live].long()
    assert torch.equal(state.kept_token[own], state.last_token[own])
    assert int((state.kept_token == POISON).sum()) == SLOTS - len(own)
    assert torch.equal(out.sampling_params[:, live], expected.sampling_params[:, live])
    assert torch.equal(out.seeds[live], expected.seeds[live])
    for i, length in enumerate(expected.seq_lens.tolist()):
        used = -(-length // BLOCK)
        assert torch.equal(out.tables[i, :used], expected.tables[i, :used])
        assert (out.tables[i, used:] == POISON).all()
    assert (whole.tokens[len(slots) :] == POISON).all()


def test_commit_touches_only_the_rows_it_is_given():
    state, other = random_state(2), random_state(2)
    slots = torch.tensor([7, -1, 3, 0], dtype=torch.int32)
    sampled = torch.tensor([11, 12, 13, 14])
    bad = torch.tensor([False, False, True, False])
    report, expected = (torch.full((4,), POISON, dtype=torch.int32) for _ in range(2))
    commit(slots, sampled, bad, state, report)
    commit_reference(slots, sampled, bad, other, expected)
    assert torch.equal(report, expected) and report.tolist() == [11, 12, -1, 14]
    assert torch.equal(state.last_token, other.last_token) and torch.equal(
        state.num_computed, other.num_computed
    )
    assert state.num_computed[7] == random_state(2).num_computed[7] + 1


def mixed_step(state: SlotState) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of slots 4, 9 and 2, of which 9 has three tokens that are known, and one of padding; 4
    and 2 were expected one and two tokens behind where they are."""
    spare = SLOTS - 1
    tokens = torch.full((4, 16), POISON, dtype=torch.int64)
    tokens[0] = 0
    tokens[0, :5] = torch.tensor([LAST_TOKEN, 50, 51, 52, LAST_TOKEN])
    tokens[1, :5] = torch.tensor([701, 5, 6, 7, 39_000])
    tokens[3] = spare
    tokens[3, :5] = torch.tensor([4, 9, 9, 9, 2])
    rows = torch.zeros(3, 4 + 4, dtype=torch.int32)
    rows[0] = spare
    rows[0, :3] = torch.tensor([4, 9, 2])
    rows[1, :3] = torch.tensor([702, 8, 39_001])
    rows[2, 1:] = torch.tensor([1, 4, 5, 5, 5, 5, 5])
    picked = torch.zeros(3, 4, dtype=torch.int64)
    picked[1] = spare
    picked[0, :2], picked[1, :2], picked[2, :2] = (
        torch.tensor(values) for values in ([0, 4], [4, 2], [701, 39_000])
    )
    state.num_computed[[4, 9, 2, spare]] = torch.tensor([700, 5, 38_998, 0], dtype=torch.int32)
    return tokens, rows, picked


def test_last_tokens_are_placed_where_the_device_has_counted_up_to():
    state, other = random_state(3), random_state(3)
    step, expected = mixed_step(state), mixed_step(other)
    place_last_tokens(*step, state, BLOCK)
    place_last_tokens_reference(*expected, other, BLOCK)
    for mine, wanted in zip(step, expected, strict=True):
        assert torch.equal(mine, wanted)
    tokens, rows, picked = step
    block = int(state.table[2, 38_998 // BLOCK])
    assert tokens[1, :5].tolist() == [700, 5, 6, 7, 38_998]
    assert int(tokens[2, 4]) == block * BLOCK + 38_998 % BLOCK
    assert (tokens[2, 1:4] == POISON).all() and (tokens[2, 5:] == POISON).all()
    assert rows[1].tolist() == [701, 8, 38_999, 0, 0, 0, 0, 0]
    assert picked[2, :2].tolist() == [700, 38_998]
    before = mixed_step(random_state(3))
    assert torch.equal(tokens[0], before[0][0]) and torch.equal(rows[2], before[1][2])


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_no_kernel_parameter_hides_a_name_that_triton_uses(path: Path) -> None:
    """Triton makes a Python function with the kernel's parameters for each launch, in which these
    are its own variables. The interpreter makes none, so only a GPU would show it."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if is_kernel(node)]
    hidden = [
        f"{function.name}({argument.arg})"
        for function in functions
        for argument in function.args.args
        if argument.arg in ("params", "specialization", "options")
    ]
    assert not hidden


def is_kernel(node: ast.AST) -> TypeGuard[ast.FunctionDef]:
    """Decorated with `triton.jit` or `gluon.jit`, called or not."""
    return isinstance(node, ast.FunctionDef) and any(
        "jit" in ast.unparse(decorator) for decorator in node.decorator_list
    )
