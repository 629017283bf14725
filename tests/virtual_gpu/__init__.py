"""The virtual GPU: what it knows, what it sees, and what the kernels do on it."""
