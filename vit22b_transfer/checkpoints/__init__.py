"""Checkpoints on disk: the one owner of their layout, read and written."""
