"""Trains and judges the nano SCAIL-2: people of a picture dance what other people dance in a video."""
