"""EViT and DynamicViT: tokens that do not matter are dropped or fused."""
