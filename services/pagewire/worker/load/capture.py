"""Whether a model's forward pass may be captured in a CUDA graph on a GPU, and what is done where
it may not. Captures nothing."""

import logging

import torch
from msgspec import structs
from pagewire_kernels.grouped_gemm import stays_on_device

from ...config import WorkerConfig
from ..device.gpus import Gpu
from ..models.architecture import Architecture

log = logging.getLogger("pagewire.worker")


def obstacle(arch: Architecture, dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """What a capture would fail at; empty where nothing is in the way."""
    if arch.moe is None or stays_on_device(dtype, capability):
        return ""
    major, minor = capability
    return (
        f"torch's grouped product of experts waits for the CPU on compute capability {major}.{minor}, which a captured step may not "
        "(on 9.x and 10.x it does not)"
    )


def eager_if_needed(
    config: WorkerConfig, arch: Architecture, dtype: torch.dtype, gpu: Gpu
) -> WorkerConfig:
    """`config`, with enforce_eager where graphs are out of the question; the log says why, unless
    it was asked for."""
    why = obstacle(arch, dtype, gpu.capability)
    if not why or config.enforce_eager:
        return config
    log.warning(
        "%s: CUDA graphs are not used, as with --enforce-eager, and few requests at a time are slower: %s",
        gpu.title(),
        why,
    )
    return structs.replace(config, enforce_eager=True)
