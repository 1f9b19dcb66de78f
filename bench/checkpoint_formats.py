"""Quantized matrices with random contents, for `checkpoint_model.py`: the tensors of each format by
their endings, and what config.json says of it.

Weights have a mean of 0 and a standard deviation of 0.02. Layouts: those of AutoAWQ, AutoGPTQ,
AutoFP8, transformers' fine-grained fp8 and bitsandbytes.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from checkpoint_files import Contents, RandomValues
from pagewire_kernels.lookup_tables import NF4

DEVIATION: Final = 0.02
"""Standard deviation of the dequantized weights."""
GROUP: Final = 128
"""Inputs that share a scale (AWQ, GPTQ), and rows and columns of a block (fp8)."""
TABLE_BLOCK: Final = 64
"""Weights that share a scale of bitsandbytes'."""
IN_A_WORD: Final = 8
"""Codes of 4 bits in an int32."""
ZERO: Final = 8
"""The mean of codes of 4 bits, which go from 1 to 15."""
FLOAT8_DEVIATION: Final = 90.0
"""Standard deviation of the 8-bit floats: the largest, 448, is five times that."""
FEW: Final = 999_983
MANY: Final = 9_999_991
"""Elements of a pool, 10 to 40 MB. Both are primes."""


Parts = Mapping[str, tuple[tuple[int, ...], Contents]]
"""Shape and contents of a matrix's tensors, by their endings."""


def _normal(count: int, random: torch.Generator) -> torch.Tensor:
    return torch.randn(count, generator=random).mul_(DEVIATION)


def _float8(count: int, random: torch.Generator) -> torch.Tensor:
    most = torch.finfo(torch.float8_e4m3fn).max
    return torch.randn(count, generator=random).mul_(FLOAT8_DEVIATION).clamp_(-most, most)


def _scales(rms_of_codes: float) -> Callable[[int, torch.Generator], torch.Tensor]:
    """Groups of a matrix differ a little."""

    def make(count: int, random: torch.Generator) -> torch.Tensor:
        factors = torch.rand(count, generator=random).mul_(0.4).add_(0.8)
        return factors.mul_(DEVIATION / rms_of_codes)

    return make


def _words(first: int, last: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    """Words of 4-bit numbers from `first` to `last`."""

    def make(count: int, random: torch.Generator) -> torch.Tensor:
        halves = (2, count * IN_A_WORD // 2)
        numbers = torch.randint(first, last + 1, halves, dtype=torch.uint8, generator=random)
        return numbers[0].add_(numbers[1] << 4).view(torch.int32)

    return make


def _bytes(count: int, random: torch.Generator) -> torch.Tensor:
    return torch.randint(256, (count,), dtype=torch.uint8, generator=random)


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


TABLE: Final = torch.tensor(NF4)
# Codes from 1 to 15, and zeros around their mean: weights have a mean of 0.
_RMS_4: Final = _rms(torch.arange(1, 16) - ZERO)
_RMS_4_ZEROS: Final = math.hypot(_RMS_4, _rms(torch.arange(-1, 2)))

WEIGHTS: Final = RandomValues(torch.bfloat16, MANY, _normal)
CODES: Final = RandomValues(torch.int32, MANY, _words(1, 15))
ZEROS: Final = RandomValues(torch.int32, FEW, _words(ZERO - 1, ZERO + 1))
STORED_ZEROS: Final = RandomValues(torch.int32, FEW, _words(ZERO - 1, ZERO - 1))
"""GPTQ's first version stores each zero less 1."""
AWQ_SCALES: Final = RandomValues(torch.float16, FEW, _scales(_RMS_4_ZEROS))
GPTQ_SCALES: Final = RandomValues(torch.float16, FEW, _scales(_RMS_4))
FLOATS: Final = RandomValues(torch.float8_e4m3fn, MANY, _float8)
FLOAT_SCALES: Final = RandomValues(torch.float32, FEW, _scales(FLOAT8_DEVIATION))
TABLE_CODES: Final = RandomValues(torch.uint8, MANY, _bytes)
TABLE_SCALES: Final = RandomValues(torch.float32, FEW, _scales(_rms(TABLE)))


@dataclass(frozen=True)
class Format:
    """parts: rows and columns of a matrix [out features, in features] -> its tensors. full_modules:
    the field of the settings that names matrices that stay full. multiples: of what rows and
    columns must be."""

    parts: Callable[[int, int], Parts]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    full_modules: str = ""
    multiples: tuple[int, int] = (1, 1)

    def quantization_config(self, full: list[str]) -> dict[str, Any]:
        """full: names of the matrices that stay full."""
        return {**self.settings, **({self.full_modules: full} if self.full_modules else {})}


def _full(rows: int, columns: int) -> Parts:
    return {"weight": ((rows, columns), WEIGHTS)}


def _awq(rows: int, columns: int) -> Parts:
    words, groups = rows // IN_A_WORD, columns // GROUP
    return {
        "qweight": ((columns, words), CODES),
        "qzeros": ((groups, words), ZEROS),
        "scales": ((groups, rows), AWQ_SCALES),
    }


def _gptq(rows: int, columns: int) -> Parts:
    groups = columns // GROUP
    return {
        "qweight": ((columns // IN_A_WORD, rows), CODES),
        "qzeros": ((groups, rows // IN_A_WORD), STORED_ZEROS),
        "scales": ((groups, rows), GPTQ_SCALES),
        "g_idx": ((columns,), _group_of(columns)),
    }


@functools.cache
def _group_of(columns: int) -> torch.Tensor:
    return torch.arange(columns, dtype=torch.int32) // GROUP


def _fp8(rows: int, columns: int) -> Parts:
    return {"weight": ((rows, columns), FLOATS), "weight_scale": ((), FLOAT_SCALES)}


def _fp8_blocks(rows: int, columns: int) -> Parts:
    blocks = (-(-rows // GROUP), -(-columns // GROUP))
    return {"weight": ((rows, columns), FLOATS), "weight_scale_inv": (blocks, FLOAT_SCALES)}


def _bitsandbytes(rows: int, columns: int) -> Parts:
    """nf4 whose scales are not quantized themselves."""
    state = {
        "quant_type": "nf4",
        "blocksize": TABLE_BLOCK,
        "dtype": "bfloat16",
        "shape": [rows, columns],
    }
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    weights = rows * columns
    return {
        "weight": ((weights // 2, 1), TABLE_CODES),
        "weight.absmax": ((weights // TABLE_BLOCK,), TABLE_SCALES),
        "weight.quant_map": ((len(TABLE),), TABLE),
        "weight.quant_state.bitsandbytes__nf4": ((len(text),), text),
    }


FULL: Final = Format(_full)
_AWQ: Final = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "version": "gemm",
    "zero_point": True,
}
_GPTQ: Final = {
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "damp_percent": 0.01,
    "desc_act": False,
    "lm_head": False,
    "sym": True,
    "true_sequential": True,
}
_FP8: Final = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_BITSANDBYTES: Final = {
    "quant_method": "bitsandbytes",
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
}
FORMATS: Final = {
    "bf16": FULL,
    "awq": Format(_awq, _AWQ, "modules_to_not_convert", (IN_A_WORD, GROUP)),
    "gptq": Format(_gptq, _GPTQ, "", (IN_A_WORD, GROUP)),
    "fp8": Format(_fp8, _FP8, "ignored_layers"),
    "fp8-blocks": Format(
        _fp8_blocks,
        {**_FP8, "fmt": "e4m3", "weight_block_size": [GROUP, GROUP]},
        "modules_to_not_convert",
    ),
    "bitsandbytes": Format(_bitsandbytes, _BITSANDBYTES, "llm_int8_skip_modules", (1, TABLE_BLOCK)),
}
