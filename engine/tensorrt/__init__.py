"""The optional TensorRT program."""
