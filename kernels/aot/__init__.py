"""Specs become proven machine code, ahead of time."""
