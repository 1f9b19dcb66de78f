"""What the machine has: GPUs, processors, compiled kernels. Knows no model."""
