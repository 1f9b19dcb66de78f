"""The type that keys and values are kept as (`--kv-cache-dtype`), and what a checkpoint says of it:
the scales of 8-bit codes, one for the keys of each layer and one for its values.

Programs spell the scales differently: compressed-tensors `….self_attn.k_scale`, before that
`….k_proj.output_scale`; ModelOpt `….k_proj.k_scale`; AutoFP8 `….self_attn.kv_scale` for both
(vLLM's `maybe_remap_kv_scale_name` lists them). A code times the scale is the number.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from pagewire_kernels.kv_cache import FP8, UNSCALED, KVScales
from torch import Tensor

from ..models.architecture import Unsupported

log = logging.getLogger("pagewire.worker")
SCALE: Final = re.compile(
    r"(?:^|\.)(?P<layer>\d+)\.(?:.+\.)?(?:(?P<kind>k|v|kv)_scale|(?P<projection>k|v)_proj\.output_scale)$"
)
UNUSED: Final = re.compile(r"\.(?:q_scale|prob_scale)$")
"""Of attention that computes in 8 bits."""


def choose(cache_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """The type of keys and values. cache_dtype: --kv-cache-dtype; dtype: of the activations."""
    return dtype if cache_dtype == "auto" else FP8


def is_scale(name: str) -> bool:
    """Whether a checkpoint's tensor is no weight but a scale for the KV cache."""
    return bool(SCALE.search(name) or UNUSED.search(name))


def scales(
    tensors: Iterable[tuple[str, Tensor]],
    layers: int,
    quantization: Mapping[str, Any],
    cache_dtype: str,
) -> tuple[KVScales, ...]:
    """Of each layer, from the tensors of a checkpoint for which `is_scale` holds; empty where the
    cache is not of 8 bits. quantization: the checkpoint's configuration of it. Says what is used.
    Raises Unsupported for scales of another scheme."""
    candidates = dict(tensors)
    if cache_dtype == "auto":
        if any(SCALE.search(name) for name in candidates):
            log.info("the checkpoint has scales of an fp8 KV cache: --kv-cache-dtype fp8 uses them")
        return ()
    _check_scheme(quantization.get("kv_cache_scheme"))
    by_layer: dict[int, dict[str, float]] = {}
    for name, tensor in candidates.items():
        match = SCALE.search(name)
        if match is None:
            continue
        layer = int(match["layer"])
        which = match["kind"] or match["projection"]
        if layer >= layers:
            raise Unsupported(f"the checkpoint has {name}, but the model has {layers} layers")
        by_layer.setdefault(layer, {}).update(dict.fromkeys(which, _value(name, tensor)))
    for layer, values in by_layer.items():
        if len(values) == 1:
            (present,) = values
            missing = "v" if present == "k" else "k"
            raise Unsupported(
                f"the checkpoint has {present}_scale of layer {layer} and no {missing}_scale: "
                f"both are needed for --kv-cache-dtype {cache_dtype}"
            )
    _say(len(by_layer), layers)
    return tuple(
        KVScales(by_layer[i]["k"], by_layer[i]["v"]) if i in by_layer else UNSCALED
        for i in range(layers)
    )


def _say(given: int, layers: int) -> None:
    if not given:
        log.warning("KV cache in fp8 (e4m3): the checkpoint has no scales for it, 1.0 is used")
    elif given < layers:
        log.warning(
            "KV cache in fp8 (e4m3): the checkpoint has scales for %d of %d layers, 1.0 is used for the others",
            given,
            layers,
        )
    else:
        log.info("KV cache in fp8 (e4m3), with the scales of the checkpoint")


def _check_scheme(scheme: Any) -> None:
    """kv_cache_scheme is compressed-tensors' description, or a word of AutoFP8's."""
    if not isinstance(scheme, Mapping):
        return
    bits = scheme.get("num_bits", 8)
    code_type = scheme.get("type", "float")
    if bits != 8 or code_type != "float":
        raise Unsupported(
            f"the checkpoint's kv_cache_scheme is {code_type} of {bits} bits, whose scales are not those of fp8: leave --kv-cache-dtype out"
        )


def _value(name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise Unsupported(
            f"{name} has shape {list(tensor.shape)}; one scale for the keys and one for the values of a layer are supported: "
            f"leave --kv-cache-dtype out"
        )
    value = float(tensor.float())
    if not math.isfinite(value) or value <= 0:
        raise Unsupported(f"{name} is {value:g}, which is no scale: the checkpoint is damaged")
    return value
