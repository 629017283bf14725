"""The Triton functions of the kernels; imported by the build and by tests alone."""
