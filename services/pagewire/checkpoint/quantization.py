"""What a checkpoint's configuration says of the quantization of its weights, and whether that
agrees with --quantization. Knows names, no tensors: it runs before torch is imported.
"""

from pathlib import Path
from typing import Final

from .errors import Unsupported
from .json_files import Config, read_object

FORMATS: Final = ("awq", "gptq", "squeezellm", "bitsandbytes", "fp8", "compressed-tensors")
"""Formats of checkpoints, as `quant_method` calls them."""
OTHER_NAMES: Final = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "compressed_tensors": "compressed-tensors",
    "fbgemm_fp8": "fp8",
}
"""Names of the same formats: of vLLM's kernels for them, and of fp8 by another program."""
MODELOPT: Final = "modelopt"
"""A program with several formats: `quant_algo` says which."""
IN_FLIGHT: Final = ("int8", "int4", "bitsandbytes", "bitsandbytes_8bit", "fp8")
"""What full weights can be rounded to while they are loaded."""
ASKABLE: Final = (*FORMATS, *OTHER_NAMES, *(name for name in IN_FLIGHT if name not in FORMATS))
"""Values of --quantization."""


def of_checkpoint(path: Path, config: Config) -> Config | None:
    """The quantization's configuration, with a `quant_method` of FORMATS; None for full weights.
    `config`: of config.json in the directory `path`. Older checkpoints have a file of their own, or
    (compressed-tensors) another name for the field.
    Raises Unsupported for another method, by name."""
    settings = (
        config.get("quantization_config") or config.get("compression_config") or _own_file(path)
    )
    if not settings:
        return None
    name = str(settings.get("quant_method", "unknown")).lower()
    method = OTHER_NAMES.get(name, name)
    if method == MODELOPT:
        # The first versions put their file's content there as it is.
        settings = settings | (settings.get("quantization") or {})
        algorithm = str(settings.get("quant_algo")).upper()
        method = "fp8" if algorithm == "FP8" else method
        name = f"{name} {algorithm}"
    if method not in FORMATS:
        raise Unsupported(
            f"weights quantized with {name!r} are not supported; {', '.join(FORMATS)}, GGUF files and full weights are"
        )
    return {**settings, "quant_method": method}


def _own_file(path: Path) -> Config:
    gptq = read_object(path / "quantize_config.json")
    if gptq:
        return {"quant_method": "gptq", **gptq}
    awq_or_squeezellm = read_object(path / "quant_config.json")
    if awq_or_squeezellm:
        return {
            "quant_method": "squeezellm" if "wbits" in awq_or_squeezellm else "awq",
            **awq_or_squeezellm,
        }
    modelopt: Config = read_object(path / "hf_quant_config.json").get("quantization") or {}
    # Without quant_algo only the KV cache is quantized.
    return {"quant_method": MODELOPT, **modelopt} if modelopt.get("quant_algo") else {}


def check(path: Path, config: Config, requested: str) -> None:
    """asked: --quantization, empty for whatever the weights bring. Raises Unsupported where it
    names another format than the checkpoint's, or one that full weights cannot be brought to."""
    settings = of_checkpoint(path, config)
    method_requested = OTHER_NAMES.get(requested, requested)
    if not requested:
        return
    if settings is None:
        if requested not in IN_FLIGHT:
            raise Unsupported(
                f"--quantization {requested}, but the checkpoint's configuration names no quantization: give a checkpoint that is "
                f"quantized so, or round full weights while they are loaded with one of {', '.join(IN_FLIGHT)}"
            )
        return
    method = settings["quant_method"]
    if method_requested.removesuffix("_8bit") != method:
        raise Unsupported(
            f"--quantization {requested}, but the checkpoint's weights are quantized with {method}: leave the flag out"
        )
