"""A decoder's layers for few tokens, done by the threads of a team: the arithmetic, and the order in which threads need each other's.

Compiled by Numba like `cpu_team`, which says how; `decode` is the function for a team. `t` are the fields of its task, `layer` those of a
layer, `mine` the address of the calling thread's own memory. Imported on first use only.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Numba's decorators change the signatures of what they decorate.

import math

import numpy as np
from numba import njit

from . import cpu_task as task
from .cpu_kernels import as_float, floats, ints, longs, shorts
from .cpu_team import FAST, MATRIX_FIELDS, PANELS, barrier, share, thread_count, thread_number, times_matrix


@njit(fastmath=FAST)
def exponential(x):
    """e to the x, to a few units in the last place; in plain arithmetic, so that a loop over it becomes vectors."""
    scaled = max(x, np.float32(-87.0)) * np.float32(1.4426950408889634)
    biased = np.int32(scaled + np.float32(127.5))
    f = scaled - np.float32(biased - np.int32(127))
    value = np.float32(1.535336188319500e-4)
    value = value * f + np.float32(1.339887440266574e-3)
    value = value * f + np.float32(9.618437357674640e-3)
    value = value * f + np.float32(5.550332471162809e-2)
    value = value * f + np.float32(2.402264791363012e-1)
    value = value * f + np.float32(6.931472028550421e-1)
    value = value * f + np.float32(1.0)
    return value * as_float(biased << np.int32(23))


@njit(fastmath=FAST)
def bits_of(field):
    return as_float(np.int32(field))


@njit(fastmath=FAST)
def sum_groups(x, at, columns, sums, first):
    """sums[first:] = sums of x[at : at + columns] by 32."""
    for g in range(columns // 32):
        total = np.float32(0)
        for i in range(32):
            total += x[at + 32 * g + i]
        sums[first + g] = total


@njit(fastmath=FAST)
def normalise(x, at, weight, eps, columns, out, to):
    squares = np.float32(0)
    for i in range(columns):
        squares += x[at + i] * x[at + i]
    factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(columns) + eps))
    for i in range(columns):
        out[to + i] = x[at + i] * factor * weight[i]


@njit(fastmath=FAST)
def rotate(x, at, size, factors, f):
    half = size // 2
    for i in range(half):
        a, b = x[at + i], x[at + half + i]
        x[at + i] = a * factors[f + i] - b * factors[f + half + i]
        x[at + half + i] = b * factors[f + i] + a * factors[f + half + i]


@njit(fastmath=FAST)
def keep(x, at, size, cache, place, short):
    """float32 number `at` and those that follow, behind address x, to the cache's element `place`."""
    if short:
        brief, words = shorts(cache), ints(x)
        for i in range(size):
            word = np.uint32(words[at + i])
            brief[place + i] = np.uint16((word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    else:
        full, given = floats(cache), floats(x)
        for i in range(size):
            full[place + i] = given[at + i]


@njit(fastmath=FAST)
def score_block(q, at, size, cache, place, count, short, scores, to):
    """Products of q[at : at + size] with `count` keys that follow each other; the largest of them."""
    most = np.float32(-np.inf)
    if short:
        brief = shorts(cache)
        for j in range(count):
            total = np.float32(0)
            for i in range(size):
                total += q[at + i] * as_float(np.int32(brief[place + j * size + i]) << np.int32(16))
            scores[to + j] = total
            most = max(most, total)
    else:
        full = floats(cache)
        for j in range(count):
            total = np.float32(0)
            for i in range(size):
                total += q[at + i] * full[place + j * size + i]
            scores[to + j] = total
            most = max(most, total)
    return most


@njit(fastmath=FAST)
def add_block(shares, first, size, cache, place, count, short, out, to):
    """out[to : to + size] += shares times `count` values that follow each other."""
    if short:
        brief = shorts(cache)
        for j in range(count):
            part = shares[first + j]
            for i in range(size):
                out[to + i] += part * as_float(np.int32(brief[place + j * size + i]) << np.int32(16))
    else:
        full = floats(cache)
        for j in range(count):
            part = shares[first + j]
            for i in range(size):
                out[to + i] += part * full[place + j * size + i]


@njit(fastmath=FAST)
def normalised(t, x, norm, count, mine):
    """The calling thread's own copy of `count` rows of x, normalised, and behind it their sums by groups; the address of those."""
    hidden = t[task.T_HIDDEN]
    source, weight, private, eps = floats(x), floats(norm), floats(mine), bits_of(t[task.T_HEAD + MATRIX_FIELDS])
    after = count * hidden
    for r in range(count):
        normalise(source, r * hidden, weight, eps, hidden, private, r * hidden)
        sum_groups(private, r * hidden, hidden, private, after + r * (hidden // 32))
    return mine + 4 * after


@njit(fastmath=FAST)
def summed(x, columns, stride, count, mine):
    """The sums by groups of `count` rows of x that lie `stride` bytes apart, in the calling thread's own memory."""
    source, private = floats(x), floats(mine)
    for r in range(count):
        sum_groups(source, r * (stride // 4), columns, private, r * (columns // 32))
    return mine


@njit(fastmath=FAST)
def project(t, layer, mine, me, threads):
    """Queries, keys and values of all tokens, normalised input times their matrices, plus biases; each thread some panels of the three."""
    tokens, hidden = t[task.T_TOKENS], t[task.T_HIDDEN]
    sums = normalised(t, t[task.T_X], layer[task.L_NORM], tokens, mine)
    total = layer[task.L_QUERY + PANELS] + layer[task.L_KEY + PANELS] + layer[task.L_VALUE + PANELS]
    first, last = share(total, me, threads)
    before = 0
    for at in (task.L_QUERY, task.L_KEY, task.L_VALUE):
        a, z = max(first - before, 0), min(last - before, layer[at + PANELS])
        times_matrix(layer, at, a, z, mine, 4 * hidden, sums, tokens, t[task.T_QKV] + 64 * before, t[task.T_QKV_STRIDE], 0)
        before += layer[at + PANELS]
    if layer[task.L_BIAS]:
        out, bias, stride = floats(t[task.T_QKV]), floats(layer[task.L_BIAS]), t[task.T_QKV_STRIDE] // 4
        for r in range(tokens):
            for i in range(16 * first, 16 * last):
                out[r * stride + i] += bias[i]


@njit(fastmath=FAST)
def turn_and_keep(t, layer, me, threads):
    """Heads are normalised and turned, keys and values go to the cache; each thread some of the heads of some tokens."""
    heads, kv, size, block = t[task.T_HEADS], t[task.T_KV_HEADS], t[task.T_SIZE], t[task.T_BLOCK]
    qkv, stride, factors, eps = (
        floats(t[task.T_QKV]),
        t[task.T_QKV_STRIDE] // 4,
        floats(layer[task.L_ROTARY]),
        bits_of(t[task.T_HEAD + MATRIX_FIELDS]),
    )
    positions, slots, each = longs(t[task.T_POSITIONS]), longs(t[task.T_SLOTS]), heads + 2 * kv
    first, last = share(t[task.T_TOKENS] * each, me, threads)
    for piece in range(first, last):
        r, head = piece // each, piece % each
        at = r * stride + head * size
        norm = layer[task.L_QUERY_NORM] if head < heads else layer[task.L_KEY_NORM] if head < heads + kv else 0
        if norm:
            normalise(qkv, at, floats(norm), eps, size, qkv, at)
        if head < heads + kv:
            rotate(qkv, at, size, factors, positions[r] * size)
        if head >= heads and slots[r] >= 0:
            cache, h = (layer[task.L_CACHE], head - heads) if head < heads + kv else (layer[task.L_VALUES], head - heads - kv)
            place = ((slots[r] // block * kv + h) * block + slots[r] % block) * size
            keep(t[task.T_QKV], at, size, cache, place, t[task.T_SHORT])


@njit(fastmath=FAST)
def attend(t, layer, mine, me, threads):
    """Softmax of scores over what each token sees, times the values; each thread some heads of some tokens."""
    heads, kv, size, block, short = t[task.T_HEADS], t[task.T_KV_HEADS], t[task.T_SIZE], t[task.T_BLOCK], t[task.T_SHORT]
    qkv, stride, out, scores = floats(t[task.T_QKV]), t[task.T_QKV_STRIDE] // 4, floats(t[task.T_ATTENDED]), floats(mine)
    positions, row_of, tables, scale = (
        longs(t[task.T_POSITIONS]),
        longs(t[task.T_ROW_OF]),
        ints(t[task.T_TABLES]),
        bits_of(layer[task.L_SCALE]),
    )
    first, last = share(t[task.T_TOKENS] * heads, me, threads)
    for piece in range(first, last):
        r, head = piece // heads, piece % heads
        end, table, to = positions[r] + 1, row_of[r] * t[task.T_TABLE_STRIDE], piece * size
        low = max(end - layer[task.L_WINDOW], 0) if layer[task.L_WINDOW] else 0
        most = np.float32(-np.inf)
        start = low
        while start < end:
            count = min(block - start % block, end - start)
            place = ((tables[table + start // block] * kv + head // (heads // kv)) * block + start % block) * size
            most = max(
                most, score_block(qkv, r * stride + head * size, size, layer[task.L_CACHE], place, count, short, scores, start - low)
            )
            start += count
        total = np.float32(0)
        for j in range(end - low):
            scores[j] = exponential((scores[j] - most) * scale)
            total += scores[j]
        for i in range(size):
            out[to + i] = np.float32(0)
        start = low
        while start < end:
            count = min(block - start % block, end - start)
            place = ((tables[table + start // block] * kv + head // (heads // kv)) * block + start % block) * size
            add_block(scores, start - low, size, layer[task.L_VALUES], place, count, short, out, to)
            start += count
        for i in range(size):
            out[to + i] /= total


@njit(fastmath=FAST)
def activate(t, first, last):
    """gate = act(gate) * up, in columns first to last."""
    gate, up, stride = floats(t[task.T_GATE]), floats(t[task.T_UP]), t[task.T_INNER_STRIDE] // 4
    for r in range(t[task.T_TOKENS]):
        if t[task.T_GELU]:
            for i in range(r * stride + first, r * stride + last):
                x = gate[i]
                inner = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)
                gate[i] = x / (np.float32(1) + exponential(-inner)) * up[i]
        else:
            for i in range(r * stride + first, r * stride + last):
                gate[i] = gate[i] / (np.float32(1) + exponential(-gate[i])) * up[i]


@njit(fastmath=FAST)
def back_to_hidden(t, layer, at, x, columns, stride, mine, me, threads):
    """The residual += x times a matrix."""
    tokens = t[task.T_TOKENS]
    sums = summed(x, columns, stride, tokens, mine)
    first, last = share(layer[at + PANELS], me, threads)
    times_matrix(layer, at, first, last, x, stride, sums, tokens, t[task.T_X], 4 * t[task.T_HIDDEN], 1)


@njit(fastmath=FAST)
def mlp(t, layer, mine, me, threads):
    tokens, hidden = t[task.T_TOKENS], t[task.T_HIDDEN]
    sums = normalised(t, t[task.T_X], layer[task.L_NORM2], tokens, mine)
    first, last = share(layer[task.L_GATE + PANELS], me, threads)
    for at, out in ((task.L_GATE, t[task.T_GATE]), (task.L_UP, t[task.T_UP])):
        times_matrix(layer, at, first, last, mine, 4 * hidden, sums, tokens, out, t[task.T_INNER_STRIDE], 0)
    activate(t, 16 * first, 16 * last)
    barrier()
    back_to_hidden(t, layer, task.L_DOWN, t[task.T_GATE], t[task.T_INNER], t[task.T_INNER_STRIDE], mine, me, threads)


@njit(fastmath=FAST)
def head(t, mine, me, threads):
    """Logits of the tokens that are wanted."""
    hidden, count = t[task.T_HIDDEN], t[task.T_COUNT]
    x, wanted, rows = floats(t[task.T_X]), longs(t[task.T_WANTED]), floats(mine)
    for i in range(count):
        for k in range(hidden):
            rows[i * hidden + k] = x[wanted[i] * hidden + k]
    sums = normalised(t, mine, t[task.T_NORM], count, mine)
    first, last = share(t[task.T_HEAD + PANELS], me, threads)
    times_matrix(t, task.T_HEAD, first, last, mine, 4 * hidden, sums, count, t[task.T_LOGITS], t[task.T_LOGITS_STRIDE], 0)


def decode(address):
    """All layers and the head for few tokens, of any sequences: each is a row of its own, which sees its sequence up to itself."""
    t = longs(address)
    me, threads = thread_number(), thread_count()
    mine = t[task.T_SCRATCH] + me * t[task.T_SCRATCH_BYTES]
    for i in range(t[task.T_LAYERS]):
        layer = longs(t[task.T_TABLE] + 8 * task.L_FIELDS * i)
        project(t, layer, mine, me, threads)
        barrier()
        turn_and_keep(t, layer, me, threads)
        barrier()
        attend(t, layer, mine, me, threads)
        barrier()
        width = t[task.T_HEADS] * t[task.T_SIZE]
        back_to_hidden(t, layer, task.L_OUTPUT, t[task.T_ATTENDED], width, 4 * width, mine, me, threads)
        barrier()
        mlp(t, layer, mine, me, threads)
        barrier()
    if t[task.T_COUNT]:
        head(t, mine, me, threads)
