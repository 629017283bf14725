"""What this computer has, and how weights reach it."""
