"""A very small model of the same architecture, and all that its training needs."""
