"""Tests of the page: its files alone, and as a person drives it in a browser."""
