"""Golden data of the reference programs, recomputed with the engine."""
