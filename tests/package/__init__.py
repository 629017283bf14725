"""Tests of engine/package."""
