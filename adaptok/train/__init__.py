"""Data, training and evaluation of the reference model and its baselines."""
