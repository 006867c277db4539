"""Tokens where an image has edges."""
