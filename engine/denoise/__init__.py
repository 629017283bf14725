"""Noise becomes latents."""
