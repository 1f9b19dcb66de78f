"""Presence, frequency and repetition penalties from per-slot counts of tokens, in place on the
logits; and the counting itself.

Rows whose penalties are all neutral are not touched. Counts live in permanent rows, one a slot, so
that a step sends no history. Logits of minus infinity stay what they are. The `*_reference`
functions are the oracles in plain torch, for any device.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import triton
import triton.language as tl


@triton.jit
def _penalize(
    logits,
    counts,
    prompted,
    slots,
    presence,
    frequency,
    repetition,
    width,
    stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    a = tl.load(presence + row)
    b = tl.load(frequency + row)
    r = tl.load(repetition + row)
    if (a == 0.0) & (b == 0.0) & (r == 1.0):
        return
    slot = tl.load(slots + row).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    n = tl.load(counts + slot * width + i, mask=inside, other=0)
    appears = (n > 0) | (tl.load(prompted + slot * width + i, mask=inside, other=0) != 0)
    pointers = logits + row.to(tl.int64) * stride + i
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(appears, tl.where(x > 0, x / r, x * r), x)
    x -= tl.where(n > 0, a, 0.0) + b * n.to(tl.float32)
    tl.store(pointers, x.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _count(counts, slots, tokens, width):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int64)
    if (slot >= 0) & (token >= 0) & (token < width):
        tl.atomic_add(counts + slot * width + token, 1)


def apply_penalties(logits: torch.Tensor, counts: torch.Tensor, prompted: torch.Tensor, slots: torch.Tensor, presence: torch.Tensor,
                    frequency: torch.Tensor, repetition: torch.Tensor) -> None:  # fmt: skip
    """In place. logits [B, V]; counts int32 [slots, V] of output tokens; prompted uint8 [slots, V];
    slots int [B]; the penalties float32 [B].

    Repetition divides positive and multiplies negative logits of tokens seen in prompt or output;
    presence and frequency look at the output alone.
    """
    width = logits.shape[1]
    _penalize[(logits.shape[0], triton.cdiv(width, 2048))](
        logits,
        counts,
        prompted,
        slots,
        presence,
        frequency,
        repetition,
        width,
        logits.stride(0),
        BLOCK=2048,
        num_warps=4,
    )


def count_tokens(counts: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add one for token tokens[i] in row slots[i] of counts; a slot of -1 is padding."""
    _count[(slots.shape[0],)](counts, slots, tokens, counts.shape[1], num_warps=1)


def apply_penalties_reference(logits: torch.Tensor, counts: torch.Tensor, prompted: torch.Tensor, slots: torch.Tensor,
                              presence: torch.Tensor, frequency: torch.Tensor, repetition: torch.Tensor) -> None:  # fmt: skip
    """The oracle of `apply_penalties`."""
    output_counts = counts[slots.long()]
    factor = repetition[:, None]
    seen = (output_counts > 0) | (prompted[slots.long()] != 0)
    x = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    logits.copy_(x - presence[:, None] * (output_counts > 0) - frequency[:, None] * output_counts)


def count_tokens_reference(counts: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """The oracle of `count_tokens`."""
    live = (slots >= 0) & (tokens >= 0) & (tokens < counts.shape[1])
    counts.index_put_(
        (slots[live].long(), tokens[live].long()), counts.new_ones(1), accumulate=True
    )
