"""Quantized matrices as their formats' programs save them, written from the formats' definitions, one
code after the other. Every packer returns the tensors of the checkpoint by their endings and the
matrix that they stand for, in float64."""

from collections.abc import Mapping

import numpy as np
import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble j of a word of the gemm layout holds output AWQ_ORDER[j]."""
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


def stream(codes: np.ndarray, bits: int) -> torch.Tensor:
    """int32 [R, words]: each row of codes [R, C] as one long number, lowest code first."""
    words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes.tolist():
        number = sum(code << (i * bits) for i, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(4 * words, "little"), np.int32))
    return torch.from_numpy(np.stack(rows).copy())


def random_codes(random: np.random.Generator, rows: int, columns: int, bits: int) -> np.ndarray:
    return random.integers(0, 1 << bits, (rows, columns))


def random_scales(
    random: np.random.Generator, rows: int, groups: int, bits: int = 4
) -> torch.Tensor:
    """Such that weights are of one size, whatever the bits."""
    return torch.from_numpy(random.uniform(0.016, 1.6, (rows, groups)) / (1 << bits)).half()


def full(
    codes: np.ndarray, zeros: np.ndarray, scales: torch.Tensor, group_of: np.ndarray
) -> torch.Tensor:
    """(code - zero) * scale, float64 [N, K]."""
    difference = torch.from_numpy(codes - zeros[:, group_of]).double()
    return difference * scales.double()[:, torch.from_numpy(group_of)]


def gptq(
    random: np.random.Generator,
    rows: int,
    columns: int,
    bits: int = 4,
    group_size: int = 32,
    version: int = 1,
    symmetric: bool = False,
    act_order: bool = False,
) -> Packed:
    group = columns if group_size == -1 else group_size
    groups = -(-columns // group)
    codes = random_codes(random, rows, columns, bits)
    zeros = random_codes(random, rows, groups, bits)
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    scales = random_scales(random, rows, groups, bits)
    group_of = np.arange(columns) // group
    if act_order:
        group_of = random.permutation(group_of)
    stored = (zeros - 1) % (1 << bits) if version == 1 else zeros
    parts = {
        "qweight": stream(codes, bits).T.contiguous(),
        "qzeros": stream(stored.T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.from_numpy(group_of).int(),
    }
    return parts, full(codes, zeros, scales, group_of)


def awq(
    random: np.random.Generator,
    rows: int,
    columns: int,
    group_size: int = 32,
    version: str = "gemm",
    zero_point: bool = True,
) -> Packed:
    group = columns if group_size == -1 else group_size
    groups = columns // group
    codes = random_codes(random, rows, columns, 4)
    zeros = random_codes(random, rows, groups, 4) if zero_point else np.full((rows, groups), 8)
    scales = random_scales(random, rows, groups)
    group_of = np.arange(columns) // group
    if version == "gemm":
        parts = {
            "qweight": stream(_interleaved(codes.T), 4),
            "qzeros": stream(_interleaved(zeros.T), 4),
            "scales": scales.T.contiguous(),
        }
    else:
        width = 8 * -(-groups // 8)
        padded = np.zeros((rows, width), np.int64)
        padded[:, :groups] = zeros
        wide = torch.zeros(rows, width, dtype=torch.float16)
        wide[:, :groups] = scales
        parts = {"qweight": stream(codes, 4), "qzeros": stream(padded, 4), "scales": wide}
    if not zero_point:
        del parts["qzeros"]
    return parts, full(codes, zeros, scales, group_of)


def _interleaved(codes: np.ndarray) -> np.ndarray:
    """[K, N] with the eight outputs of each word in AWQ_ORDER."""
    by_word = codes.reshape(len(codes), -1, 8)
    return by_word[:, :, list(AWQ_ORDER)].reshape(codes.shape)


def squeezellm(
    random: np.random.Generator, rows: int, columns: int, bits: int = 4, sparse: bool = False
) -> Packed:
    codes = random_codes(random, rows, columns, bits)
    table = torch.from_numpy(random.standard_normal((rows, 1 << bits))).half()
    weight = table.double().gather(1, torch.from_numpy(codes))
    parts = {"qweight": stream(codes, bits).T.contiguous(), "lookup_table": table}
    if sparse:
        mask = random.random((rows, columns)) < 0.05
        at = np.argwhere(mask)
        values = torch.from_numpy(random.standard_normal(len(at))).float()
        counts = np.concatenate(([0], mask.sum(1).cumsum()))
        outputs = random.permutation(rows)[:2]
        whole = torch.from_numpy(random.standard_normal((columns, 2))).float()
        parts |= {
            "rows": torch.from_numpy(counts).int(),
            "cols": torch.from_numpy(at[:, 1].copy()).int(),
            "vals": values,
            "full_rows": whole,
            "full_row_indices": torch.from_numpy(outputs.copy()).int(),
        }
        weight[at[:, 0], at[:, 1]] += values.double()
        weight[outputs] += whole.double().T
    return parts, weight


def fp8(
    random: np.random.Generator,
    rows: int,
    columns: int,
    scales: str = "tensor",
    block: int = 128,
) -> Packed:
    """scales: tensor, row or block."""
    weight = torch.from_numpy(random.standard_normal((rows, columns))).to(torch.float8_e4m3fn)
    shape = {
        "tensor": (),
        "row": (rows, 1),
        "block": (-(-rows // block), -(-columns // block)),
    }[scales]
    scale = torch.from_numpy(np.asarray(random.uniform(0.001, 0.1, shape))).float()
    wide = weight.double()
    for i in range(rows):
        for j in range(columns):
            at = {"tensor": (), "row": (i, 0), "block": (i // block, j // block)}[scales]
            wide[i, j] *= scale[at].double()
    name = "weight_scale_inv" if scales == "block" else "weight_scale"
    return {"weight": weight, name: scale}, wide


def on_module(parts: Mapping[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    """The tensors under their full names."""
    return {f"{module}.{ending}": tensor for ending, tensor in parts.items()}
