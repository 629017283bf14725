"""The engine package on disk, written and read."""
