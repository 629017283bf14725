"""Turns a checkpoint into an engine package, offline: nothing that serves imports it."""
