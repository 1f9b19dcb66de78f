"""Slot state kernels against their references, in Triton's interpreter."""

import ast
from dataclasses import fields
from pathlib import Path
from typing import TypeGuard

import pagewire_kernels
import pytest
import torch
from pagewire_kernels.slot_state import (
    DecodeRows,
    SlotState,
    commit,
    commit_reference,
    decode_inputs,
    decode_inputs_reference,
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
