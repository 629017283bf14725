"""From a checkpoint to an engine package. Offline: nothing of the worker imports it."""
