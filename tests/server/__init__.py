"""Tests of engine/server."""
