"""Tests of engine/tensorrt."""
