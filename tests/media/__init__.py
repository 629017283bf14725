"""Tests of engine/media."""
