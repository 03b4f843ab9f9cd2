"""Public weights in and out: one table per family, one engine for all of them."""
