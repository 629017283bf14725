"""Tests of engine/masks."""
