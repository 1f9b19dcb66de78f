"""x @ weight^T with weights of 4 bits on Hopper GPUs (compute capability 9.0), for more than some
tens of rows; see gemm_quantized.py, whose matrices and roundings these are.

One warp copies rows of x to shared memory, some steps ahead. Groups of four warps take 64 weight
rows each: they read codes from memory into the registers that need them, and decode the codes of
one step while the tensor cores multiply those of the step before. Decoding costs about as many
instructions as multiplying, so a group does it for as many rows of x as its sums have registers
for: two groups with 256 rows, or, where there are no more than 128, four groups with 128.

Programs stay until all is done, and take one tile after the other. Where the last round of tiles
would leave many of them idle, the last one to two tiles for each program are cut into equal
ranges of steps, whatever tiles they are of (stream-K). The program that has a tile's first steps
adds the sums of those that have the others, which began with them and are done. Where there are
few tiles, each is cut into splits instead; each split writes its sums, waits for the others, and
adds up its share of the rows. All orders are fixed.

Written in Gluon, whose interface changes between releases of Triton: `hopper_plan.takes` names the
one this is for, and others never import this file.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Launch options and values inside a kernel have types that only Triton's compiler knows.

import functools
from typing import Final

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_plan import GROUP_ROWS, STEP_COLUMNS, WIDE_TILE, HopperPlan, plan
from .packed_matrix import PackedMatrix
from .workspace import counters

BN = gl.constexpr(GROUP_ROWS)
"""Weight rows of one group of warps."""
STEP = gl.constexpr(STEP_COLUMNS)
"""Inputs of a step, whose codes lie together."""
GROUP_M = gl.constexpr(8)
"""Tiles of x that are multiplied with a tile of weights one after the other."""
SPREAD = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0]))
"""[threads 128, words of a step 4]."""
THREADS = gl.constexpr(gl.SliceLayout(1, WORDS))


# --- decoding ---


def _prepare(bf16: bool, rest: bool) -> str:
    """PTX: from a scale and a zero point (float16 each, in one word) to pairs of equal values: what
    is subtracted from codes, the scale, what its rounding left, and what is added at last."""
    lines = [
        "{", ".reg .b16 s, z;", ".reg .b32 t;", ".reg .f32 fs, fz, fw, fr;",
        "mov.b32 {s, z}, $4;", "cvt.f32.f16 fs, s;", "cvt.f32.f16 fz, z;",
    ]  # fmt: skip
    if rest:
        lines += [
            "add.f32 fw, fz, 0f3F000000;", "cvt.rmi.f32.f32 fw, fw;", "max.f32 fw, fw, 0fC2F00000;", "min.f32 fw, fw, 0f42F00000;",
            "sub.f32 fr, fw, fz;", "mul.f32 fr, fr, fs;", "mov.f32 fz, fw;",
        ]  # fmt: skip
    else:
        lines += ["mov.f32 fr, 0f00000000;"]
    pair = "bf16x2" if bf16 else "f16x2"
    lines += [f"add.f32 fz, fz, {'0f43000000' if bf16 else '0f44800000'};"]
    lines += [f"cvt.rn.{pair}.f32 $0, fz, fz;", f"cvt.rn.{pair}.f32 $1, fs, fs;"]
    lines += [f"cvt.rn.{pair}.f32 $3, fr, fr;"]
    if bf16:
        lines += ["shl.b32 t, $1, 16;", "mov.b32 fw, t;", "sub.f32 fw, fs, fw;"]
        lines += [f"cvt.rn.{pair}.f32 $2, fw, fw;"]
    else:
        lines += ["mov.b32 $2, 0;"]
    return "\n".join([*lines, "}"])


def _decode(bf16: bool, rest: bool) -> str:
    """PTX: eight codes of a word to values, those of two weight rows by turns."""
    magic = "0x43004300" if bf16 else "0x64006400"
    pair = "bf16x2" if bf16 else "f16x2"
    lines = ["{", ".reg .b32 t<4>;", ".reg .b32 u;", "mov.b32 t0, $8;"]
    lines += [f"shr.u32 t{i}, $8, {4 * i};" for i in (1, 2, 3)]
    lines += [f"lop3.b32 t{i}, t{i}, 0x000f000f, {magic}, 0xea;" for i in range(4)]
    for i in range(4):
        zero, scale, low, added = (f"${9 + 4 * (i % 2) + j}" for j in range(4))
        lines += [f"sub.{pair} t{i}, t{i}, {zero};"]
        if bf16 and rest:
            lines += [f"fma.rn.{pair} u, t{i}, {low}, {added};"]
        elif bf16:
            lines += [f"mul.{pair} u, t{i}, {low};"]
        if bf16 or rest:
            lines += [f"fma.rn.{pair} t{i}, t{i}, {scale}, {'u' if bf16 else added};"]
        else:
            lines += [f"mul.{pair} t{i}, t{i}, {scale};"]
        lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, t{i};"]
    return "\n".join([*lines, "}"])


@gluon.jit
def _spread(values, EACH: gl.constexpr):
    """One of `_scales` [128, groups of a step] -> [128, 4], for each word."""
    wide = gl.expand_dims(values, 2).broadcast_to([128, 4 // EACH, EACH])
    return gl.convert_layout(gl.reshape(wide, [128, 4]), WORDS)


@gluon.jit
def _scales(pairs, ASM: gl.constexpr):
    """pairs int32 [128, groups of a step] -> (zero, scale, low, added), each int32 [128, 4]."""
    EACH: gl.constexpr = 4 // pairs.shape[1]
    zero, scale, low, added = gl.inline_asm_elementwise(
        ASM, "=&r,=&r,=&r,=&r,r", [pairs], dtype=(gl.int32,) * 4, is_pure=True, pack=1
    )
    return _spread(zero, EACH), _spread(scale, EACH), _spread(low, EACH), _spread(added, EACH)


@gluon.jit
def _values(
    words, first, second, free, OPERAND: gl.constexpr, TYPE: gl.constexpr, ASM: gl.constexpr
):
    """words int32 [128, 4] of a step, and `_scales` of a thread's two rows (eight apart) ->
    [64, 64], as the tensor cores take a left operand. free: see _accumulate."""
    after = gl.expand_dims(free, 1).broadcast_to([128, 4])
    arguments = [words, first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3], after]  # fmt: skip
    if gl.bfloat16 == TYPE:
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            ASM,
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r,r,r,r,r,r,r,r,r",
            arguments,
            dtype=(gl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            ASM,
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r,r,r,r,r,r,r,r,r",
            arguments,
            dtype=(gl.float16,) * 8,
            is_pure=True,
            pack=1,
        )
    values = gl.join(gl.join(gl.join(a, b), gl.join(c, d)), gl.join(gl.join(e, f), gl.join(g, h)))
    # a warp's 16 rows, row of 8, columns; 16 inputs; pair, half of rows, half of inputs
    values = gl.permute(gl.reshape(values, [4, 8, 4, 4, 2, 2, 2]), [0, 5, 1, 3, 6, 2, 4])
    return gl.convert_layout(gl.reshape(values, [64, 64]), OPERAND)


# --- what a program does ---


@gluon.jit
def _range(program, programs, tiles, whole, span, steps, SPLITS: gl.constexpr):
    """(first step, the one behind the last) of the part that is cut, counted through all tiles.
    SPLITS 0: nothing is; 1: into equal ranges."""
    if SPLITS == 0:
        return 0, 0
    if SPLITS > 1:
        tile = program // SPLITS * steps
        begin = program % SPLITS * span
        return tile + begin, tile + gl.minimum(begin + span, steps)
    total = (tiles - whole * programs) * steps
    each = total // programs
    longer = total % programs
    begin = whole * programs * steps + program * each + gl.minimum(program, longer)
    return begin, begin + each + gl.where(program < longer, 1, 0)


@gluon.jit
def _pieces(program, programs, tiles, whole, begin, end, steps, SPLITS: gl.constexpr):
    """How many pieces of work a program has: whole tiles, and parts of tiles from begin to end."""
    if SPLITS == 0:
        return (tiles - program + programs - 1) // programs
    return whole + gl.where(end > begin, (end - 1) // steps - begin // steps + 1, 0)


@gluon.jit
def _piece(i, program, programs, whole, begin, end, steps, SPLITS: gl.constexpr):
    """Tile, first step in it, and the one behind the last."""
    if SPLITS == 0:
        return i * programs + program, 0, steps
    cut = begin // steps + i - whole
    first = gl.maximum(begin - cut * steps, 0)
    last = gl.minimum(end - cut * steps, steps)
    is_whole = i < whole
    tile = gl.where(is_whole, i * programs + program, cut)
    return tile, gl.where(is_whole, 0, first), gl.where(is_whole, steps, last)


@gluon.jit
def _place(tile, tiles_m, tiles_n):
    """Tile of x and tile of weights."""
    width = GROUP_M * tiles_n
    first = tile // width * GROUP_M
    count = gl.minimum(tiles_m - first, GROUP_M)
    rest = tile % width
    return first + rest % count, rest // count


@gluon.jit
def _produce(x_desc, x_tiles, full, empty, tiles_m, tiles_n, whole, span, steps, BM: gl.constexpr, SPLITS: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    begin, end = _range(program, programs, tiles_m * tiles_n, whole, span, steps, SPLITS)
    number = 0
    for i in range(_pieces(program, programs, tiles_m * tiles_n, whole, begin, end, steps, SPLITS)):
        tile, first, last = _piece(i, program, programs, whole, begin, end, steps, SPLITS)
        tile_m, _ = _place(tile, tiles_m, tiles_n)
        for step in range(first, last):
            stage = number % STAGES
            mbarrier.wait(empty.index(stage), ((number // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BM * STEP * 2)
            tma.async_copy_global_to_shared(
                x_desc, [tile_m * BM, step * STEP], full.index(stage), x_tiles.index(stage)
            )
            number += 1


@gluon.jit
def _load_words(words, strip, step, steps, strips):
    """A step's words of one strip of 64 weight rows."""
    thread = gl.arange(0, 128, THREADS)
    word = gl.arange(0, 4, gl.SliceLayout(0, WORDS))
    place = (strip * steps + step) * 512 + (thread * 4)[:, None] + word[None, :]
    return gl.load(words + place, mask=strip < strips, other=0)


@gluon.jit
def _load_pairs(scales, strip, step, NP, strips, LOWER: gl.constexpr, GROUP: gl.constexpr):
    """Scale and zero point of the upper or the lower of a thread's two rows: int32 [128, groups]."""
    GROUPS: gl.constexpr = STEP // GROUP if GROUP < STEP else 1
    EACH: gl.constexpr = 4 // GROUPS
    spread: gl.constexpr = gl.BlockedLayout([1, GROUPS, EACH], [32, 1, 1], [4, 1, 1], [2, 1, 0])
    layout: gl.constexpr = gl.SliceLayout(2, spread)
    thread = gl.arange(0, 128, gl.SliceLayout(1, layout))
    group = step * STEP // GROUP + gl.arange(0, GROUPS, gl.SliceLayout(0, layout))
    row = strip * 64 + thread // 32 * 16 + thread % 32 // 4 + 8 * LOWER
    return gl.load(scales + group[None, :] * NP + row[:, None], mask=strip < strips, other=0)


@gluon.jit
def _accumulate(words, scales, x_tiles, full, empty, number, strip, begin, end, steps, NP, BM: gl.constexpr, TYPE: gl.constexpr,
                GROUP: gl.constexpr, PREPARE: gl.constexpr, DECODE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The sums [BN, BM] of steps begin..end, the first of which was copied as number `number`.

    `free` is nothing but a sign that the wait before it is over: registers that are decoded into
    must not be those that a product under way reads.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    strips = NP // 64
    acc = gl.zeros([BN, BM], gl.float32, ACC)
    free = gl.zeros([128], gl.int32, THREADS)
    w = _load_words(words, strip, begin, steps, strips)
    first = _load_pairs(scales, strip, begin, NP, strips, 0, GROUP)
    second = _load_pairs(scales, strip, begin, NP, strips, 1, GROUP)
    a = _values(w, _scales(first, PREPARE), _scales(second, PREPARE), free, OPERAND, TYPE, DECODE)
    later = gl.minimum(begin + 1, end - 1)
    w = _load_words(words, strip, later, steps, strips)
    first = _load_pairs(scales, strip, later, NP, strips, 0, GROUP)
    second = _load_pairs(scales, strip, later, NP, strips, 1, GROUP)
    for step in range(begin, end):
        stage = number % STAGES
        later = gl.minimum(step + 2, end - 1)
        mbarrier.wait(full.index(stage), (number // STAGES) & 1)
        acc = warpgroup_mma(a, x_tiles.index(stage).permute((1, 0)), acc, is_async=True)
        of_first = _scales(first, PREPARE)
        of_second = _scales(second, PREPARE)
        first = _load_pairs(scales, strip, later, NP, strips, 0, GROUP)
        second = _load_pairs(scales, strip, later, NP, strips, 1, GROUP)
        b = _values(w, of_first, of_second, free, OPERAND, TYPE, DECODE)
        w = _load_words(words, strip, later, steps, strips)
        acc, free = warpgroup_mma_wait(0, [acc, free])
        mbarrier.arrive(empty.index(stage))
        a = b
        number += 1
    return acc, number


# --- sums that several programs share ---


@gluon.jit
def _by_thread(acc, BM: gl.constexpr):
    """acc [BN, BM] -> [BM * 16, 4], where a thread has the four of a row and neighbours have
    neighbouring rows. acc: a warp's 16 rows, half of them, 8; 8 rows of x, column, pair."""
    parts = gl.reshape(acc, [4, 2, 8, BM // 8, 4, 2])
    return gl.reshape(gl.permute(parts, [3, 0, 2, 4, 1, 5]), [BM * 16, 4])


@gluon.jit
def _by_row(flat, ROWS: gl.constexpr):
    """The way back: [ROWS * 16, 4] -> [BN, ROWS]."""
    parts = gl.permute(gl.reshape(flat, [ROWS // 8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
    return gl.reshape(parts, [BN, ROWS])


@gluon.jit
def _offsets(ROWS: gl.constexpr, layout: gl.constexpr):
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    return (row * 4)[:, None] + gl.arange(0, 4, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _store_part(acc, part, BM: gl.constexpr):
    flat = _by_thread(acc, BM)
    layout: gl.constexpr = flat.type.layout
    gl.store(part + _offsets(BM * 16, layout), flat)


@gluon.jit
def _add_part(acc, part, BM: gl.constexpr):
    whole: gl.constexpr = acc.type.layout
    flat = _by_thread(acc, BM)
    layout: gl.constexpr = flat.type.layout
    flat += gl.load(part + _offsets(BM * 16, layout), cache_modifier=".cg")
    return gl.convert_layout(_by_row(flat, BM), whole)


@gluon.jit
def _write(room, out, out_stride, m, n, M, N, ROWS: gl.constexpr):
    """room [ROWS, BN] in shared memory to rows m.. and columns n.. of `out`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = m + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = n + gl.arange(0, BN, gl.SliceLayout(0, layout))
    inside = (row < M)[:, None] & (column < N)[None, :]
    values = room.load(layout)
    gl.store(out + row.to(gl.int64)[:, None] * out_stride + column[None, :], values, mask=inside)


@gluon.jit
def _with_bias(acc, bias, n, N, BIAS: gl.constexpr):
    if BIAS:
        layout: gl.constexpr = acc.type.layout
        row = n + gl.arange(0, BN, gl.SliceLayout(1, layout))
        acc += gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)[:, None]
    return acc


@gluon.jit
def _finish_split(acc, part, counter, split, slots, room, out, out_stride, bias, m, n, M, N, BM: gl.constexpr, SPLITS: gl.constexpr,
                  BIAS: gl.constexpr):  # fmt: skip
    """The sums of one split to `part` [splits, BM * BN], a slot of which is `slots` apart; then this
    split's share of the rows of all. Counters only ever rise, by SPLITS a launch, so that none must
    be cleared while others look."""
    _store_part(acc, part + split * slots, BM)
    gl.thread_barrier()
    before = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    target = (before & (0 - SPLITS)) + SPLITS
    while gl.atomic_add(counter, 0, sem="acq_rel", scope="gpu") - target < 0:
        pass
    gl.thread_barrier()
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    SHARE: gl.constexpr = BM // SPLITS
    offsets = split * (SHARE * BN) + _offsets(SHARE * 16, layout)
    sums = gl.zeros([SHARE * 16, 4], gl.float32, layout)
    for other in gl.static_range(SPLITS):
        sums += gl.load(part + other * slots + offsets, cache_modifier=".cg")
    share = _with_bias(_by_row(sums, SHARE), bias, n, N, BIAS)
    here = room.slice(0, SHARE)
    here.permute((1, 0)).store(share.to(room.dtype))
    _write(here, out, out_stride, m + split * SHARE, n, M, N, SHARE)


@gluon.jit
def _add_others(acc, part, flags, program, programs, covered, tile, tiles, whole, span, steps, slots, PART: gl.constexpr,
                PARTS: gl.constexpr, BM: gl.constexpr):  # fmt: skip
    """acc and the sums of the programs that have the rest of its tile, from step `covered` on."""
    other = program + 1
    while covered < steps:
        flag = flags + other * PARTS + PART
        while gl.atomic_add(flag, 0, sem="acq_rel", scope="gpu") == 0:
            pass
        gl.thread_barrier()
        acc = _add_part(acc, part + (other * PARTS + PART) * slots, BM)
        gl.thread_barrier()
        gl.atomic_xchg(flag, 0, sem="acq_rel", scope="gpu")
        _, end = _range(other, programs, tiles, whole, span, steps, 1)
        covered = gl.minimum(end - tile * steps, steps)
        other += 1
    return acc


@gluon.jit
def _consume(words, scales, bias, out, part, arrived, x_tiles, rooms, full, empty, tiles_m, tiles_n, whole, span, steps, out_stride, M, N,
             NP, factor, PART: gl.constexpr, PARTS: gl.constexpr, BM: gl.constexpr, TYPE: gl.constexpr, GROUP: gl.constexpr,
             SPLITS: gl.constexpr, BIAS: gl.constexpr, PREPARE: gl.constexpr, DECODE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    SLOT: gl.constexpr = BM * BN
    room = rooms.index(PART)
    begin, end = _range(program, programs, tiles_m * tiles_n, whole, span, steps, SPLITS)
    number = 0
    for i in range(_pieces(program, programs, tiles_m * tiles_n, whole, begin, end, steps, SPLITS)):
        tile, first, last = _piece(i, program, programs, whole, begin, end, steps, SPLITS)
        tile_m, tile_n = _place(tile, tiles_m, tiles_n)
        strip = tile_n * PARTS + PART
        acc, number = _accumulate(words, scales, x_tiles, full, empty, number, strip, first, last, steps, NP, BM, TYPE, GROUP, PREPARE,
                                  DECODE, STAGES)  # fmt: skip
        acc *= factor
        m = tile_m * BM
        n = strip * BN
        if SPLITS > 1:
            parts = part + (tile * SPLITS * PARTS + PART) * SLOT
            _finish_split(acc, parts, arrived + tile * PARTS + PART, program % SPLITS, PARTS * SLOT, room, out, out_stride, bias, m, n,
                          M, N, BM, SPLITS, BIAS)  # fmt: skip
        elif SPLITS == 1:
            if first > 0:
                _store_part(acc, part + (program * PARTS + PART) * SLOT, BM)
                gl.thread_barrier()
                gl.atomic_xchg(arrived + program * PARTS + PART, 1, sem="acq_rel", scope="gpu")
            else:
                acc = _add_others(acc, part, arrived, program, programs, last, tile, tiles_m * tiles_n, whole, span, steps, SLOT, PART,
                                  PARTS, BM)  # fmt: skip
                room.permute((1, 0)).store(_with_bias(acc, bias, n, N, BIAS).to(room.dtype))
                _write(room, out, out_stride, m, n, M, N, BM)
        else:
            room.permute((1, 0)).store(_with_bias(acc, bias, n, N, BIAS).to(room.dtype))
            _write(room, out, out_stride, m, n, M, N, BM)


# --- both ---


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit(do_not_specialize=["M", "tiles_m", "tiles_n", "whole", "span", "steps"])
def _product(x_desc, words, scales, bias, out, part, arrived, tiles_m, tiles_n, whole, span, steps, out_stride, M, N, NP, factor,
             BM: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SPLITS: gl.constexpr, BIAS: gl.constexpr,
             PREPARE: gl.constexpr, DECODE: gl.constexpr):  # fmt: skip
    TYPE: gl.constexpr = x_desc.dtype
    x_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BM, STEP], SPREAD)
    ROOM: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    rooms = gl.allocate_shared_memory(TYPE, [PARTS, BM, BN], ROOM)
    full = _barriers(STAGES, 1)
    empty = _barriers(STAGES, PARTS)
    hopper.fence_async_shared()
    if PARTS == 2:
        gl.warp_specialize(
            [(_consume, (words, scales, bias, out, part, arrived, x_tiles, rooms, full, empty, tiles_m, tiles_n, whole, span, steps,
                         out_stride, M, N, NP, factor, 0, PARTS, BM, TYPE, GROUP, SPLITS, BIAS, PREPARE, DECODE, STAGES)),
             (_consume, (words, scales, bias, out, part, arrived, x_tiles, rooms, full, empty, tiles_m, tiles_n, whole, span, steps,
                         out_stride, M, N, NP, factor, 1, PARTS, BM, TYPE, GROUP, SPLITS, BIAS, PREPARE, DECODE, STAGES)),
             (_produce, (x_desc, x_tiles, full, empty, tiles_m, tiles_n, whole, span, steps, BM, SPLITS, STAGES))],
            [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize(
            [(_consume, (words, scales, bias, out, part, arrived, x_tiles, rooms, full, empty, tiles_m, tiles_n, whole, span, steps,
                         out_stride, M, N, NP, factor, 0, PARTS, BM, TYPE, GROUP, SPLITS, BIAS, PREPARE, DECODE, STAGES)),
             (_consume, (words, scales, bias, out, part, arrived, x_tiles, rooms, full, empty, tiles_m, tiles_n, whole, span, steps,
                         out_stride, M, N, NP, factor, 1, PARTS, BM, TYPE, GROUP, SPLITS, BIAS, PREPARE, DECODE, STAGES)),
             (_consume, (words, scales, bias, out, part, arrived, x_tiles, rooms, full, empty, tiles_m, tiles_n, whole, span, steps,
                         out_stride, M, N, NP, factor, 2, PARTS, BM, TYPE, GROUP, SPLITS, BIAS, PREPARE, DECODE, STAGES)),
             (_consume, (words, scales, bias, out, part, arrived, x_tiles, rooms, full, empty, tiles_m, tiles_n, whole, span, steps,
                         out_stride, M, N, NP, factor, 3, PARTS, BM, TYPE, GROUP, SPLITS, BIAS, PREPARE, DECODE, STAGES)),
             (_produce, (x_desc, x_tiles, full, empty, tiles_m, tiles_n, whole, span, steps, BM, SPLITS, STAGES))],
            [4, 4, 4, 1], [112, 112, 112, 24])  # fmt: skip


# --- the host's side ---


FLAGS: Final = 1 << 13
"""Multiprocessors times groups of warps, at most."""


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _assembly(dtype: torch.dtype, rest: bool) -> tuple[str, str]:
    """PTX for `_scales` and for `_values`."""
    bf16 = dtype == torch.bfloat16
    return _prepare(bf16, rest), _decode(bf16, rest)


def hopper_linear(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None,
    out: Tensor,
    chosen: HopperPlan | None = None,
) -> None:
    """x [M, K] times the transpose of matrix [N, K], plus bias [N], to out [M, N]; see
    `hopper_plan.takes`."""
    rows, columns = x.shape
    padded = matrix.padded
    c = chosen or plan(rows, padded, columns, _multiprocessors(x.device))
    tiles_m = triton.cdiv(rows, c.rows)
    tiles_n = triton.cdiv(padded, c.groups * GROUP_ROWS)
    part = out
    if c.splits:
        size = c.programs * c.groups * c.rows * GROUP_ROWS
        part = torch.empty(size, dtype=torch.float32, device=x.device)
    shape = [c.rows, STEP_COLUMNS]
    x_desc = TensorDescriptor(x, [rows, columns], [x.stride(0), 1], shape, SPREAD.value)
    prepare, decode = _assembly(x.dtype, matrix.rest)
    _product[(c.programs,)](
        x_desc, matrix.words, matrix.scales, bias, out, part, _flags(x.device, c), tiles_m, tiles_n, c.whole, c.span,
        columns // STEP_COLUMNS, out.stride(0), rows, matrix.shape[0], padded, matrix.factor, BM=c.rows, PARTS=c.groups,
        STAGES=c.stages, GROUP=matrix.group, SPLITS=c.splits, BIAS=bias is not None, PREPARE=prepare, DECODE=decode,
        num_warps=4, maxnreg=168 if c.groups == WIDE_TILE[1] else 96)  # fmt: skip


def _flags(device: torch.device, c: HopperPlan) -> Tensor:
    """int32, one for each group of warps of each program; of their own for each number of splits,
    by multiples of which they rise."""
    needed = c.programs * c.groups
    region = c.splits.bit_length() * FLAGS
    return counters(device, "quantized gemm, Hopper", region + max(needed, FLAGS))[region:]
