"""The shipped model with a second method around its blocks: what is fitted, and what is drawn."""
