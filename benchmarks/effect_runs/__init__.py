"""Small training runs that repeat the comparisons of the DC-DiT paper on emoji."""
