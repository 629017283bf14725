"""The suite of single kernels."""
