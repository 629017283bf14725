"""What a person asks for on the command line, as requests."""
