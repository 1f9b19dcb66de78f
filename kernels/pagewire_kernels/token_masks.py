"""Which tokens rows may sample, as one bit a token: logits of the others become minus infinity, in
place.

Only what is excluded is written, and logits are not read, so that a mask costs a fraction of the
sampling after it. `reference.apply_token_masks` is the oracle in plain torch, for any device.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import torch
import triton
import triton.language as tl


@triton.jit
def _exclude(logits, rows, words, width, stride, num_words, BLOCK: tl.constexpr):
    mask_row = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + mask_row).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    word = tl.load(words + mask_row * num_words + i // 32, mask=inside, other=-1)
    excluded = ((word >> (i % 32)) & 1) == 0
    gone = tl.full((BLOCK,), float("-inf"), tl.float32)
    tl.store(logits + row * stride + i, gone, mask=inside & excluded)


def apply_token_masks(logits: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> None:
    """In place. logits [R, V] float32; rows int [G], indices into these; words int32 [G, ceil(V /
    32)]: bit i % 32 of word i // 32 is set where token i stays."""
    width = logits.shape[1]
    _exclude[(rows.shape[0], triton.cdiv(width, 4096))](
        logits, rows, words, width, logits.stride(0), words.shape[1], BLOCK=4096, num_warps=4
    )
