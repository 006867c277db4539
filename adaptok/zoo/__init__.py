"""What ships with adaptok: the emoji pictures, and small trained checkpoints with their cards."""

from adaptok.zoo.models import list_zoo_models, load_zoo_model

__all__ = ["list_zoo_models", "load_zoo_model"]
