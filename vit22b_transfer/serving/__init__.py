"""A local page and its JSON endpoints; artifacts that other processes serve."""
