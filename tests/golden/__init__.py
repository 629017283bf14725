"""Tests of engine/golden."""
