"""A table for each public family of weights."""
