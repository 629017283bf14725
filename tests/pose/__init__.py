"""Tests of engine/pose."""
