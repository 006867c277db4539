"""Early exit: samples leave a ViT when a head is sure, and a DiT by a timestep schedule."""
