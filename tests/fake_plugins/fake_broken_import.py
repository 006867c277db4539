"""Raises when it is imported."""

raise RuntimeError("the fake plug-in is broken on purpose")
