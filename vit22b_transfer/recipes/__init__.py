"""Recipes: gin files with clear errors."""
