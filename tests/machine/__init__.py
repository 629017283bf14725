"""Tests of engine/machine."""
