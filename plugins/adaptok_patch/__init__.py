"""Patches whose size follows the entropy of the image."""
