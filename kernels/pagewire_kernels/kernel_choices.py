"""Which of several kernels a process uses for the same operation, where that is known only once it
has been measured or checked on this process's GPU."""

from dataclasses import dataclass, field

from .gemm_cublaslt import GemmAlgorithms


@dataclass
class KernelChoices:
    """Made with the operations of a device, and changed only while a worker starts: what has been
    captured in a graph keeps the kernels that it was captured with."""

    gemm: GemmAlgorithms = field(default_factory=GemmAlgorithms)
    hopper_prefill: bool = True
    """Whether long prompts go to attention_prefill_hopper.py where it has a kernel for them."""
    hopper_quantized: bool = True
    """Whether products with matrices of 4 bits go to gemm_quantized_hopper.py where it takes them."""
    int4_groups: set[tuple[int, bool]] = field(default_factory=set)
    """Of the matrices of 4 bits that were packed: inputs that share a scale, and whether some zero
    points are no whole numbers."""
