"""What a newcomer runs first: a drawn dancer, a dance, and weights small enough for any machine."""
