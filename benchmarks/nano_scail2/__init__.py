"""Trains and judges the nano SCAIL-2: people of a picture dance what others dance in a video."""
