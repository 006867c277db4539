"""k-NN over emoji as a measure of what a wrapped model's features still know."""
