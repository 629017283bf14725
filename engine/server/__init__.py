"""The same jobs over HTTP on one's own GPU."""
