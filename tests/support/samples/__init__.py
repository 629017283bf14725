"""Device functions that only tests compile."""
