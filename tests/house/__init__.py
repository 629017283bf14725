"""Tests of the house itself: layers, images, documents."""
