"""What the threads of a team do together: one product with quantized weights, or weights made
dense.

Compiled by Numba, each function for one address of int64, the fields of a task by number. Every
thread runs all of it; `share` says which part is whose, and where one needs what others computed,
they meet at a barrier. Imported on first use only.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Numba's decorators change the signatures of what they decorate.

from numba import types

from .cpu_kernels import call_dequantize, call_matmul, inlined, longs
from .cpu_task import (
    D_BRIEF,
    D_FIELDS,
    D_OUT,
    D_OUT_STRIDE,
    DATA,
    DEQUANTIZE,
    FUNCTION,
    GROUPS,
    M_COUNT,
    M_FIELDS,
    M_OUT,
    M_OUT_STRIDE,
    M_ROWS,
    M_SUMS,
    M_X,
    M_X_STRIDE,
    MATRIX_FIELDS,
    PANELS,
)

thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())


@inlined
def share(total, part, parts):
    """(first, last) of what thread `part` does of `total` pieces."""
    return total * part // parts, total * (part + 1) // parts


@inlined
def times_matrix(m, at, first, last, x, x_stride, sums, rows, out, out_stride, add):
    """out[:, 16 * first : 16 * last] (+)= x times those panels of the matrix at m[at]."""
    if last > first:
        call_matmul(
            m[at + FUNCTION],
            m[at + DATA],
            x,
            x_stride,
            sums,
            m[at + GROUPS],
            rows,
            first,
            last,
            out,
            out_stride,
            add,
        )


def multiply(task):
    """out [rows, 16 * panels of all matrices] = x times each of them, side by side."""
    t = longs(task)
    me = thread_number()
    threads = thread_count()
    total = 0
    for i in range(t[M_COUNT]):
        total += t[M_FIELDS + i * MATRIX_FIELDS + PANELS]
    mine, end = share(total, me, threads)
    before = 0
    for i in range(t[M_COUNT]):
        at = M_FIELDS + i * MATRIX_FIELDS
        first = max(mine - before, 0)
        last = min(end - before, t[at + PANELS])
        out = t[M_OUT] + 64 * before
        times_matrix(
            t, at, first, last, t[M_X], t[M_X_STRIDE], t[M_SUMS], t[M_ROWS], out, t[M_OUT_STRIDE], 0
        )
        before += t[at + PANELS]


def make_dense(task):
    """out [K, 16 * panels], float32 or (brief) bfloat16: the weight, transposed."""
    t = longs(task)
    first, last = share(t[D_FIELDS + PANELS], thread_number(), thread_count())
    if last > first:
        call_dequantize(
            t[D_FIELDS + DEQUANTIZE],
            t[D_FIELDS + DATA],
            t[D_FIELDS + GROUPS],
            first,
            last,
            t[D_OUT],
            t[D_OUT_STRIDE],
            t[D_BRIEF],
        )
