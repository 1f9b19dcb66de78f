"""The GPU kernels as cases to check and to time. Needs torch and triton; importing it asks for no
GPU."""
