"""The machine: what this computer has, and how weights reach its GPU."""
