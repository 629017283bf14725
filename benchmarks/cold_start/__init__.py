"""The suite of starting a worker."""
