"""The numbers that the tasks of native functions are made of, by their place in an array of
int64."""

from typing import Final

# The fields of one matrix in a task. A matrix of several pieces (query, key, value) is several of
# these.
FUNCTION, DATA, GROUPS, GROUP, PANELS, DEQUANTIZE, MATRIX_FIELDS = range(7)

# Of the task of `cpu_team.multiply`; the matrices follow.
M_COUNT, M_X, M_X_STRIDE, M_SUMS, M_ROWS, M_OUT, M_OUT_STRIDE, M_FIELDS = range(8)

# Of the task of `cpu_team.make_dense`; the matrix follows.
D_OUT, D_OUT_STRIDE, D_BRIEF, D_FIELDS = range(4)

# Of the task of `cpu_layers.decode`.
T_LAYERS: Final = 0
T_TABLE: Final = 1
T_TOKENS: Final = 2
T_HIDDEN: Final = 3
T_HEADS: Final = 4
T_KV_HEADS: Final = 5
T_SIZE: Final = 6
T_INNER: Final = 7
T_BLOCK: Final = 8
T_X: Final = 9
T_POSITIONS: Final = 10
T_ROW_OF: Final = 11
T_TABLES: Final = 12
T_TABLE_STRIDE: Final = 13
T_SLOTS: Final = 14
T_SCRATCH: Final = 15
T_SCRATCH_BYTES: Final = 16
T_QKV: Final = 17
T_QKV_STRIDE: Final = 18
T_ATTENDED: Final = 19
T_GATE: Final = 20
T_UP: Final = 21
T_INNER_STRIDE: Final = 22
T_CACHE: Final = 23
"""What the caches hold: CACHE_FLOAT32 and so on."""
T_GELU: Final = 24
T_NORM: Final = 25
T_LOGITS_INDICES: Final = 26
T_COUNT: Final = 27
T_LOGITS: Final = 28
T_LOGITS_STRIDE: Final = 29
T_HEAD: Final = 30
"""A matrix, of MATRIX_FIELDS; behind it the bits of epsilon."""
T_FIELDS: Final = T_HEAD + MATRIX_FIELDS + 1

# Of a layer: seven matrices, then these.
L_QUERY: Final = 0 * MATRIX_FIELDS
L_KEY: Final = 1 * MATRIX_FIELDS
L_VALUE: Final = 2 * MATRIX_FIELDS
L_OUTPUT: Final = 3 * MATRIX_FIELDS
L_GATE: Final = 4 * MATRIX_FIELDS
L_UP: Final = 5 * MATRIX_FIELDS
L_DOWN: Final = 6 * MATRIX_FIELDS
L_NORM: Final = 7 * MATRIX_FIELDS + 0
L_NORM2: Final = 7 * MATRIX_FIELDS + 1
L_QUERY_NORM: Final = 7 * MATRIX_FIELDS + 2
L_KEY_NORM: Final = 7 * MATRIX_FIELDS + 3
L_BIAS: Final = 7 * MATRIX_FIELDS + 4
L_ROTARY: Final = 7 * MATRIX_FIELDS + 5
L_CACHE: Final = 7 * MATRIX_FIELDS + 6
L_VALUES: Final = 7 * MATRIX_FIELDS + 7
L_WINDOW: Final = 7 * MATRIX_FIELDS + 8
L_SCALE: Final = 7 * MATRIX_FIELDS + 9
L_KEY_SCALE: Final = 7 * MATRIX_FIELDS + 10
L_VALUE_SCALE: Final = 7 * MATRIX_FIELDS + 11
L_FIELDS: Final = 7 * MATRIX_FIELDS + 12

# What caches hold: T_CACHE.
CACHE_FLOAT32, CACHE_BFLOAT16, CACHE_E4M3 = range(3)

# Of the task of `cpu_gumbel.find_candidates`: addresses, but for the three numbers.
(
    G_LOGITS,  # float32 [rows, width], contiguous
    G_ROWS,
    G_WIDTH,
    G_SLICES,  # pieces of a row, for threads to share
    G_SCALES,  # float32 [rows]: 1 / temperature
    G_FLOORS,  # float32 [rows]: the least logit that is kept
    G_SEEDS,  # int64 [rows]
    G_POSITIONS,  # int64 [rows]
    G_SCRATCH,  # uint32 [threads, G_BLOCK]
    G_IDS,  # int64 [rows, slices, G_CANDIDATES], written
    G_WORDS,  # int64 [rows, slices, G_CANDIDATES], written
    G_COUNTS,  # int64 [rows, slices], written; more than G_CANDIDATES where they overflow
    G_FIELDS,
) = range(13)
G_CANDIDATES: Final = 8
"""Tokens of a slice whose exact scores the caller compares."""
G_BLOCK: Final = 1024
"""Vocabulary ids whose words are computed before they are looked at: they stay in the L1 cache."""
