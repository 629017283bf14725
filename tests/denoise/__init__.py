"""Tests of engine/denoise."""
