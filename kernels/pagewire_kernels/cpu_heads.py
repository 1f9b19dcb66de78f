"""Attention of few tokens as part of `cpu_layers`: heads are normalised, turned and kept in the
caches, and attend to what these hold.

Compiled by Numba; see `cpu_team` for what is common to all of it. Imported on first use only.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Numba's decorators change the signatures of what they decorate.

import math

import numpy as np

from . import cpu_task as task
from .cpu_kernels import as_float, floats, inlined, ints, longs, octets, shorts
from .cpu_kernels import bits_of as word_of
from .cpu_task import MATRIX_FIELDS
from .cpu_team import share


@inlined
def exponential(x):
    """e to the x, to a few units in the last place; in plain arithmetic, so that a loop over it
    becomes vectors."""
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


@inlined
def bits_of(field):
    return as_float(np.int32(field))


@inlined
def normalise(x, at, weight, eps, columns, out, to):
    squares = np.float32(0)
    for i in range(columns):
        squares += x[at + i] * x[at + i]
    factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(columns) + eps))
    for i in range(columns):
        out[to + i] = x[at + i] * factor * weight[i]


@inlined
def rotate(x, at, size, factors, f):
    half = size // 2
    for i in range(half):
        a = x[at + i]
        b = x[at + half + i]
        x[at + i] = a * factors[f + i] - b * factors[f + half + i]
        x[at + half + i] = b * factors[f + i] + a * factors[f + half + i]


@inlined
def number_of(code):
    """The float32 of an e4m3 code. NaN stays NaN."""
    bits = np.int32(code)
    size = bits & np.int32(127)
    number = as_float(np.int32((size << np.int32(20)) + np.int32(120 << 23)))
    if size < 8:
        number = np.float32(size) * np.float32(0.001953125)
    if size == 127:
        number = as_float(np.int32(0x7FC00000))
    return -number if bits > 127 else number


@inlined
def code_of(x):
    """The e4m3 code of a float32: the nearest, ties to even; saturating at 448. NaN stays NaN. See
    attention_common.codes."""
    word = word_of(x)
    sign = (word >> np.int32(24)) & np.int32(0x80)
    size = word & np.int32(0x7FFFFFFF)
    if size > np.int32(0x7F800000):
        return np.uint8(0x7F | sign)
    size = min(size, np.int32(0x43E00000))
    if size < np.int32(121 << 23):
        step = word_of(as_float(np.int32(size)) + np.float32(16384.0)) - np.int32(0x46800000)
        return np.uint8(step | sign)
    even = (size >> np.int32(20)) & np.int32(1)
    return np.uint8(
        ((size + np.int32(0x7FFFF) + even - np.int32(120 << 23)) >> np.int32(20)) | sign
    )


@inlined
def keep(x, at, size, cache, element, cache_type, scale):
    """float32 number `at` and those that follow, behind address x, to element `element` of the
    cache; codes are of numbers over `scale`."""
    if cache_type == task.CACHE_E4M3:
        codes = octets(cache)
        wide = floats(x)
        for i in range(size):
            codes[element + i] = code_of(wide[at + i] / scale)
    elif cache_type == task.CACHE_BFLOAT16:
        brief = shorts(cache)
        words = ints(x)
        for i in range(size):
            word = np.uint32(words[at + i])
            brief[element + i] = np.uint16(
                (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1)))
                >> np.uint32(16)
            )
    else:
        full = floats(cache)
        numbers = floats(x)
        for i in range(size):
            full[element + i] = numbers[at + i]


@inlined
def score_block(q, at, size, cache, element, count, cache_type, scores, to):
    """Products of q[at : at + size] with `count` keys that follow each other; the largest of
    them."""
    most = np.float32(-np.inf)
    if cache_type == task.CACHE_E4M3:
        codes = octets(cache)
        for j in range(count):
            total = np.float32(0)
            for i in range(size):
                total += q[at + i] * number_of(codes[element + j * size + i])
            scores[to + j] = total
            most = max(most, total)
    elif cache_type == task.CACHE_BFLOAT16:
        brief = shorts(cache)
        for j in range(count):
            total = np.float32(0)
            for i in range(size):
                total += q[at + i] * as_float(
                    np.int32(brief[element + j * size + i]) << np.int32(16)
                )
            scores[to + j] = total
            most = max(most, total)
    else:
        full = floats(cache)
        for j in range(count):
            total = np.float32(0)
            for i in range(size):
                total += q[at + i] * full[element + j * size + i]
            scores[to + j] = total
            most = max(most, total)
    return most


@inlined
def add_block(shares, first, size, cache, element, count, cache_type, out, to):
    """out[to : to + size] += shares times `count` values that follow each other."""
    if cache_type == task.CACHE_E4M3:
        codes = octets(cache)
        for j in range(count):
            part = shares[first + j]
            for i in range(size):
                out[to + i] += part * number_of(codes[element + j * size + i])
    elif cache_type == task.CACHE_BFLOAT16:
        brief = shorts(cache)
        for j in range(count):
            part = shares[first + j]
            for i in range(size):
                out[to + i] += part * as_float(
                    np.int32(brief[element + j * size + i]) << np.int32(16)
                )
    else:
        full = floats(cache)
        for j in range(count):
            part = shares[first + j]
            for i in range(size):
                out[to + i] += part * full[element + j * size + i]


@inlined
def turn_and_keep(t, layer, me, threads):
    """Heads are normalised and turned, keys and values go to the cache; each thread some of the
    heads of some tokens."""
    heads = t[task.T_HEADS]
    kv = t[task.T_KV_HEADS]
    size = t[task.T_SIZE]
    block = t[task.T_BLOCK]
    qkv = floats(t[task.T_QKV])
    stride = t[task.T_QKV_STRIDE] // 4
    factors = floats(layer[task.L_ROTARY])
    eps = bits_of(t[task.T_HEAD + MATRIX_FIELDS])
    positions = longs(t[task.T_POSITIONS])
    slots = longs(t[task.T_SLOTS])
    each = heads + 2 * kv
    first, last = share(t[task.T_TOKENS] * each, me, threads)
    for piece in range(first, last):
        r = piece // each
        head = piece % each
        at = r * stride + head * size
        norm = (
            layer[task.L_QUERY_NORM]
            if head < heads
            else layer[task.L_KEY_NORM]
            if head < heads + kv
            else 0
        )
        if norm:
            normalise(qkv, at, floats(norm), eps, size, qkv, at)
        if head < heads + kv:
            rotate(qkv, at, size, factors, positions[r] * size)
        if head >= heads and slots[r] >= 0:
            cache, scale, h = (
                (layer[task.L_CACHE], layer[task.L_KEY_SCALE], head - heads)
                if head < heads + kv
                else (layer[task.L_VALUES], layer[task.L_VALUE_SCALE], head - heads - kv)
            )
            element = ((slots[r] // block * kv + h) * block + slots[r] % block) * size
            keep(t[task.T_QKV], at, size, cache, element, t[task.T_CACHE], bits_of(scale))


@inlined
def place_of(t, layer, table, head, token):
    """Where in a cache the key of a sequence's token lies, for a query head."""
    kv = t[task.T_KV_HEADS]
    block = t[task.T_BLOCK]
    page = ints(t[task.T_TABLES])[table + token // block]
    return ((page * kv + head // (t[task.T_HEADS] // kv)) * block + token % block) * t[task.T_SIZE]


@inlined
def attend_head(t, layer, query, head, table, low, end, scores, out, to):
    """One head of one token, over tokens low to end of its sequence: out[to:] = softmax(scores)
    times values."""
    size = t[task.T_SIZE]
    block = t[task.T_BLOCK]
    cache_type = t[task.T_CACHE]
    qkv = floats(t[task.T_QKV])
    scale = bits_of(layer[task.L_SCALE])
    most = np.float32(-np.inf)
    total = np.float32(0)
    for start in range(low // block * block, end, block):
        a = max(start, low)
        z = min(start + block, end)
        element = place_of(t, layer, table, head, a)
        most = max(
            most,
            score_block(
                qkv, query, size, layer[task.L_CACHE], element, z - a, cache_type, scores, a - low
            ),
        )
    for j in range(end - low):
        scores[j] = exponential((scores[j] - most) * scale)
        total += scores[j]
    for i in range(size):
        out[to + i] = np.float32(0)
    for start in range(low // block * block, end, block):
        a = max(start, low)
        z = min(start + block, end)
        element = place_of(t, layer, table, head, a)
        add_block(scores, a - low, size, layer[task.L_VALUES], element, z - a, cache_type, out, to)
    factor = bits_of(layer[task.L_VALUE_SCALE]) / total
    for i in range(size):
        out[to + i] *= factor


@inlined
def attend(t, layer, mine, me, threads):
    """Softmax of scores over what each token sees, times the values; each thread some heads of some
    tokens."""
    heads = t[task.T_HEADS]
    size = t[task.T_SIZE]
    stride = t[task.T_QKV_STRIDE] // 4
    out = floats(t[task.T_ATTENDED])
    positions = longs(t[task.T_POSITIONS])
    row_of = longs(t[task.T_ROW_OF])
    window = layer[task.L_WINDOW]
    first, last = share(t[task.T_TOKENS] * heads, me, threads)
    for piece in range(first, last):
        r = piece // heads
        head = piece % heads
        end = positions[r] + 1
        low = max(end - window, 0) if window else 0
        table = row_of[r] * t[task.T_TABLE_STRIDE]
        attend_head(
            t,
            layer,
            r * stride + head * size,
            head,
            table,
            low,
            end,
            floats(mine),
            out,
            piece * size,
        )
