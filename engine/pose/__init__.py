"""Motion capture: what a dance video says, and the skeleton video drawn from it."""
