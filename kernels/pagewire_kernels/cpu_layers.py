"""A decoder's layers for few tokens, done by the threads of a team: the arithmetic, and the order
in which threads need each other's.

Compiled by Numba like `cpu_team`, which says how; `decode` is the function for a team. `t` are the
fields of its task, `layer` those of a layer, `mine` the address of the calling thread's own memory.
Imported on first use only.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Numba's decorators change the signatures of what they decorate.

import numpy as np

from . import cpu_task as task
from .cpu_heads import attend, bits_of, exponential, normalise, turn_and_keep
from .cpu_kernels import floats, inlined, longs
from .cpu_task import MATRIX_FIELDS, PANELS
from .cpu_team import barrier, share, thread_count, thread_number, times_matrix


@inlined
def sum_groups(x, at, columns, sums, first):
    """sums[first:] = sums of x[at : at + columns] by 32."""
    for g in range(columns // 32):
        total = np.float32(0)
        for i in range(32):
            total += x[at + 32 * g + i]
        sums[first + g] = total


@inlined
def normalised(t, x, norm, count, mine):
    """The calling thread's own copy of `count` rows of x, normalised, and behind it their sums by
    groups; the address of those."""
    hidden = t[task.T_HIDDEN]
    source = floats(x)
    weight = floats(norm)
    private = floats(mine)
    eps = bits_of(t[task.T_HEAD + MATRIX_FIELDS])
    after = count * hidden
    for r in range(count):
        normalise(source, r * hidden, weight, eps, hidden, private, r * hidden)
        sum_groups(private, r * hidden, hidden, private, after + r * (hidden // 32))
    return mine + 4 * after


@inlined
def summed(x, columns, stride, count, mine):
    """The sums by groups of `count` rows of x that lie `stride` bytes apart, in the calling
    thread's own memory."""
    source = floats(x)
    private = floats(mine)
    for r in range(count):
        sum_groups(source, r * (stride // 4), columns, private, r * (columns // 32))
    return mine


@inlined
def project(t, layer, mine, me, threads):
    """Queries, keys and values of all tokens, normalised input times their matrices, plus biases;
    each thread some panels of the three."""
    tokens = t[task.T_TOKENS]
    hidden = t[task.T_HIDDEN]
    sums = normalised(t, t[task.T_X], layer[task.L_NORM], tokens, mine)
    total = layer[task.L_QUERY + PANELS] + layer[task.L_KEY + PANELS] + layer[task.L_VALUE + PANELS]
    first, last = share(total, me, threads)
    before = 0
    for at in (task.L_QUERY, task.L_KEY, task.L_VALUE):
        a = max(first - before, 0)
        z = min(last - before, layer[at + PANELS])
        times_matrix(
            layer,
            at,
            a,
            z,
            mine,
            4 * hidden,
            sums,
            tokens,
            t[task.T_QKV] + 64 * before,
            t[task.T_QKV_STRIDE],
            0,
        )
        before += layer[at + PANELS]
    if layer[task.L_BIAS]:
        out = floats(t[task.T_QKV])
        bias = floats(layer[task.L_BIAS])
        stride = t[task.T_QKV_STRIDE] // 4
        for r in range(tokens):
            for i in range(16 * first, 16 * last):
                out[r * stride + i] += bias[i]


@inlined
def activate(t, first, last):
    """gate = act(gate) * up, in columns first to last."""
    gate = floats(t[task.T_GATE])
    up = floats(t[task.T_UP])
    stride = t[task.T_INNER_STRIDE] // 4
    for r in range(t[task.T_TOKENS]):
        if t[task.T_GELU]:
            for i in range(r * stride + first, r * stride + last):
                x = gate[i]
                inner = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)
                gate[i] = x / (np.float32(1) + exponential(-inner)) * up[i]
        else:
            for i in range(r * stride + first, r * stride + last):
                gate[i] = gate[i] / (np.float32(1) + exponential(-gate[i])) * up[i]


@inlined
def back_to_hidden(t, layer, at, x, columns, stride, mine, me, threads):
    """The residual += x times a matrix."""
    tokens = t[task.T_TOKENS]
    sums = summed(x, columns, stride, tokens, mine)
    first, last = share(layer[at + PANELS], me, threads)
    times_matrix(
        layer, at, first, last, x, stride, sums, tokens, t[task.T_X], 4 * t[task.T_HIDDEN], 1
    )


@inlined
def mlp(t, layer, mine, me, threads):
    tokens = t[task.T_TOKENS]
    hidden = t[task.T_HIDDEN]
    sums = normalised(t, t[task.T_X], layer[task.L_NORM2], tokens, mine)
    first, last = share(layer[task.L_GATE + PANELS], me, threads)
    for at, out in ((task.L_GATE, t[task.T_GATE]), (task.L_UP, t[task.T_UP])):
        times_matrix(
            layer, at, first, last, mine, 4 * hidden, sums, tokens, out, t[task.T_INNER_STRIDE], 0
        )
    activate(t, 16 * first, 16 * last)
    barrier()
    back_to_hidden(
        t,
        layer,
        task.L_DOWN,
        t[task.T_GATE],
        t[task.T_INNER],
        t[task.T_INNER_STRIDE],
        mine,
        me,
        threads,
    )


@inlined
def head(t, mine, me, threads):
    """Logits of the tokens that are wanted."""
    hidden = t[task.T_HIDDEN]
    count = t[task.T_COUNT]
    x = floats(t[task.T_X])
    logits_indices = longs(t[task.T_LOGITS_INDICES])
    rows = floats(mine)
    for i in range(count):
        for k in range(hidden):
            rows[i * hidden + k] = x[logits_indices[i] * hidden + k]
    sums = normalised(t, mine, t[task.T_NORM], count, mine)
    first, last = share(t[task.T_HEAD + PANELS], me, threads)
    times_matrix(
        t,
        task.T_HEAD,
        first,
        last,
        mine,
        4 * hidden,
        sums,
        count,
        t[task.T_LOGITS],
        t[task.T_LOGITS_STRIDE],
        0,
    )


def decode(address):
    """All layers and the head for few tokens, of any sequences: each is a row of its own, which
    sees its sequence up to itself."""
    t = longs(address)
    me = thread_number()
    threads = thread_count()
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
        back_to_hidden(
            t, layer, task.L_OUTPUT, t[task.T_ATTENDED], width, 4 * width, mine, me, threads
        )
        barrier()
        mlp(t, layer, mine, me, threads)
        barrier()
    if t[task.T_COUNT]:
        head(t, mine, me, threads)
