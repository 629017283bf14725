"""Kernels and what they stand on: GPUs and tensors, nothing of SCAIL, HTTP or video."""
