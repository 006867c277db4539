"""What ships with adaptok: the emoji pictures, and small trained checkpoints with their cards."""
