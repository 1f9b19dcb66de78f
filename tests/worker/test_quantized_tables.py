"""Weights whose codes are places in a table: what a start keeps quantized, on a GPU and on a CPU, in
how many bytes, and what it says of it."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from pagewire.worker.load import formats, quantizing
from pagewire.worker.load.formats.base import CheckpointFormat
from pagewire.worker.load.gguf_file import Gguf
from pagewire.worker.load.quantizing import Checkpoint, Target
from pagewire.worker.models import describe
from pagewire.worker.models.rounding import ROUNDINGS, by_table
from pagewire_kernels import gpu_quantized_size
from pagewire_kernels.lookup_tables import FP4, NF4, ROW_TABLES, form_of
from pagewire_kernels.quantized import Quantized
from safetensors.torch import save_file
from worker import format_packers as packers

GPU = Target(torch.bfloat16, (9, 0))
CPU = Target(torch.float32)
ROWS, COLUMNS = 128, 256
LLAMA = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
}  # fmt: skip


def bitsandbytes(weight: torch.Tensor, kind: str, blocksize: int = 64) -> dict[str, torch.Tensor]:
    """As the library saves it, by its definition."""
    blocks = weight.flatten().view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    table = torch.tensor(NF4 if kind == "nf4" else FP4, dtype=torch.float32)
    distance = (blocks / absmax[:, None])[:, :, None] - table
    codes = distance.abs().argmin(-1).flatten().to(torch.uint8)
    state = {"blocksize": blocksize, "shape": list(weight.shape), "quant_type": kind}
    text = json.dumps(state).encode()
    return {
        "weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": table,
        f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(text), dtype=torch.uint8),
    }


def read(kind: str) -> CheckpointFormat:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return formats.read({"quant_method": "bitsandbytes", **settings})


@pytest.mark.parametrize("blocksize", [64, 128, 512])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_of_bitsandbytes_are_kept(kind: str, blocksize: int) -> None:
    """Blocks larger than a row too, each row with the scales of those that it lies in."""
    torch.manual_seed(1)
    parts = bitsandbytes(torch.randn(ROWS, COLUMNS), kind, blocksize)
    matrix = read(kind).matrix("m", parts)
    assert isinstance(matrix, Quantized)
    codes = parts["weight"][:, 0]
    codes = torch.stack((codes >> 4, codes & 15), 1).flatten()
    scales = parts["weight.absmax"].repeat_interleave(blocksize)
    wanted = (parts["weight.quant_map"][codes.long()] * scales).view(ROWS, COLUMNS)
    assert torch.equal(matrix.dequantize(), wanted)


def test_a_table_of_another_kind_is_made_full() -> None:
    parts = bitsandbytes(torch.randn(ROWS, COLUMNS), "nf4")
    parts["weight.quant_map"] = parts["weight.quant_map"] * 0.5
    assert isinstance(read("nf4").matrix("m", parts), torch.Tensor)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rounding_takes_the_nearest_value(kind: str) -> None:
    torch.manual_seed(2)
    weight = torch.randn(16, 128)
    parts = bitsandbytes(weight, kind)
    ours = by_table(weight, kind)
    assert isinstance(ours, Quantized)
    wanted = read(kind).matrix("m", parts)
    assert isinstance(wanted, Quantized)
    assert torch.equal(ours.dequantize(), wanted.dequantize())
    # rows that are no whole blocks
    assert isinstance(by_table(weight[:, :96], kind), torch.Tensor)


def checkpoint(path: Path, method: str, tensors: dict[str, Any]) -> Checkpoint:
    save_file({f"layer.{name}": tensor for name, tensor in tensors.items()}, path / "a.safetensors")
    form = formats.read({"quant_method": method, "load_in_4bit": True, "wbits": 4})
    return Checkpoint(path, form)


@pytest.mark.parametrize("method", ["bitsandbytes", "squeezellm"])
def test_a_gpu_keeps_tables_and_a_cpu_does_not(method: str, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "pagewire.worker")
    if method == "bitsandbytes":
        tensors = bitsandbytes(torch.randn(ROWS, COLUMNS), "fp4")
    else:
        tensors, _ = packers.squeezellm(np.random.default_rng(1), ROWS, COLUMNS, 4, False)
    source = checkpoint(tmp_path, method, tensors)
    arch = describe(LLAMA)
    kept = quantizing.choose(source, arch, "", GPU)
    assert "1 matrices stay quantized, which saves" in caplog.text
    assert source.form is not None
    matrix = source.form.matrix("layer", tensors)
    assert isinstance(matrix, Quantized)
    assert matrix.table is not None
    packed = gpu_quantized_size.packed_bytes(
        ROWS, COLUMNS, matrix.group, 4, False, form_of(matrix.table)
    )
    full = (arch.parameters - ROWS * COLUMNS) * 2
    assert kept.weight_bytes(arch) == packed + full + quantizing._scratch(arch)
    assert quantizing.choose(source, arch, "", CPU) == quantizing.NONE
    assert "made full while they are loaded, since there are no products" in caplog.text


def test_matrices_with_a_sparse_part_are_made_full(tmp_path: Path, caplog) -> None:
    tensors, _ = packers.squeezellm(np.random.default_rng(1), ROWS, COLUMNS, 4, True)
    source = checkpoint(tmp_path, "squeezellm", tensors)
    assert quantizing.choose(source, describe(LLAMA), "", GPU) == quantizing.NONE
    assert "the 1 matrices are made full while they are loaded" in caplog.text


def test_extents_of_tables() -> None:
    parts, _ = packers.squeezellm(np.random.default_rng(1), ROWS, COLUMNS, 3, False)
    shapes = {ending: tuple(tensor.shape) for ending, tensor in parts.items()}
    extent = formats.read({"quant_method": "squeezellm", "wbits": 3}).extent("m", shapes)
    assert (extent.rows, extent.columns, extent.table) == (ROWS, COLUMNS, ROW_TABLES)


def test_rounding_to_nf4_stays_on_a_gpu(caplog) -> None:
    caplog.set_level("INFO", "pagewire.worker")
    arch = describe(LLAMA)
    chosen = quantizing.choose(Checkpoint(None), arch, "bitsandbytes", GPU)
    assert chosen.kept
    assert chosen.rounding is ROUNDINGS["bitsandbytes"]
    table = arch.vocab_size * arch.hidden_size
    rounded = arch.parameters - 2 * table
    scratch = quantizing._scratch(arch)
    assert chosen.weight_bytes(arch) == int(4 * table + rounded * 0.5625) + scratch
    assert "they stay quantized, which saves about" in caplog.text
    # in float32 there are no products, so they are held in full
    single = quantizing.choose(
        Checkpoint(None), arch, "bitsandbytes", Target(torch.float32, (9, 0))
    )
    assert not single.kept
    assert "held in full" in caplog.text
    assert not quantizing.choose(Checkpoint(None), arch, "bitsandbytes", CPU).kept


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.5625),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1.002),
        ({"quant_method": "squeezellm", "wbits": 4}, 2),
    ],
)
def test_random_weights_of_a_configuration(settings: dict[str, Any], share: float) -> None:
    form = formats.read(settings)
    chosen = quantizing.choose(Checkpoint(None, form), describe(LLAMA), "", GPU)
    assert chosen.kept == (share < 2)
    assert chosen.rounding is None or isinstance(
        chosen.rounding.values(torch.randn(ROWS, COLUMNS)), Quantized
    )
    if chosen.kept:
        arch = describe(LLAMA)
        table = arch.vocab_size * arch.hidden_size
        rounded = arch.parameters - 2 * table
        scratch = quantizing._scratch(arch)
        assert chosen.weight_bytes(arch) == int(4 * table + rounded * share) + scratch


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ4_XS"])
def test_types_of_gguf_with_tables(kind: str, caplog) -> None:
    caplog.set_level("INFO", "pagewire.worker")
    file = Mock(
        Gguf,
        type_counts=lambda: {kind: 3},
        count_bytes=lambda kept, itemsize: int(1000 * kept.get(kind, itemsize)),
    )
    arch = describe(LLAMA)
    chosen = quantizing.choose(Checkpoint(file), arch, "", GPU)
    table = 2 * arch.vocab_size * arch.hidden_size
    assert chosen.weight_bytes(arch) == 625 + table + quantizing._scratch(arch)
    assert f"3 {kind} matrices stay quantized" in caplog.text
    assert quantizing.choose(Checkpoint(file), arch, "", CPU) == quantizing.NONE
