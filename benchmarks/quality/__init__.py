"""The suite of what 8 bits cost in quality."""
