"""Formats of files that hold weights."""
