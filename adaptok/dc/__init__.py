"""DC-DiT, the reference method: learned dynamic chunking with elastic budgets."""

from adaptok.dc.baseline import DiT
from adaptok.dc.chunker import DCChunker
from adaptok.dc.config import DCDiTConfig, DiTConfig
from adaptok.dc.dechunker import DCDechunker
from adaptok.dc.folder import ModelCard, TrainedModel, load_model, save_model
from adaptok.dc.model import DCDiT
from adaptok.dc.router import DCRouter

__all__ = [
    "DCChunker",
    "DCDechunker",
    "DCDiT",
    "DCDiTConfig",
    "DCRouter",
    "DiT",
    "DiTConfig",
    "ModelCard",
    "TrainedModel",
    "load_model",
    "save_model",
]
