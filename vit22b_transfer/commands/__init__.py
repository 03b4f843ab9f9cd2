"""The arguments of each command; `cli.py` is the entry point."""
