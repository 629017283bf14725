"""The suite of one forward of the denoiser."""
