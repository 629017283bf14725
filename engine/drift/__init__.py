"""Long clips keep their colours: each later segment is measured, and brought back to the first."""
