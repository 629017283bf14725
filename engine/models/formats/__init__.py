"""The formats in which files hold weights: one module for each way to store a matrix."""
