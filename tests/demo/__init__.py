"""Tests of engine/demo."""
