"""The first thing a newcomer runs: a drawn dancer, a dance, weights that any machine can hold."""
