"""Tests of engine/build."""
