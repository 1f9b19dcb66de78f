"""The formats of quantized checkpoints, each in a file: what their tensors are called, and how they
become matrices. `docs/quantization.md` is the overview."""

from collections.abc import Mapping
from typing import Any, Final

from .awq import Awq
from .base import CheckpointFormat
from .bitsandbytes import Bitsandbytes
from .compressed_tensors import CompressedTensors
from .fp8 import Fp8
from .gptq import Gptq
from .squeezellm import SqueezeLlm

FORMATS: Final = {
    form.name: form for form in (Awq, Gptq, SqueezeLlm, Bitsandbytes, Fp8, CompressedTensors)
}


def read(settings: Mapping[str, Any]) -> CheckpointFormat:
    """The format of a checkpoint, from the quantization's configuration. Raises Unsupported."""
    return FORMATS[settings["quant_method"]].read(settings)
