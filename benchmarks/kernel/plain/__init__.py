"""Plain Triton kernels like those that others measured, to hold the model against. No product."""
