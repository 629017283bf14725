"""The suite of whole clips."""
