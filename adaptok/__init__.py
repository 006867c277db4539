"""adaptok: adaptive tokenizers for any Vision Transformer or Diffusion Transformer.

The reference model spends its tokens where the image needs them:

>>> import torch, adaptok
>>> model = adaptok.DCDiT(adaptok.DCDiTConfig(hidden_size=64, depth=2, num_heads=4, latent_size=8))
>>> x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([3])
>>> out, routing = model(x, t, y, keep=0.25, return_routing=True)
>>> routing.kept
tensor([16])
"""

from importlib import import_module
from typing import TYPE_CHECKING

from adaptok.errors import AdaptokError

if TYPE_CHECKING:
    from adaptok import losses
    from adaptok import see as see
    from adaptok.adapters import load, save
    from adaptok.backbones.plain import ListBackbone
    from adaptok.blocks import AdaptiveBlocks
    from adaptok.budgeted import budget, set_budget
    from adaptok.budgets import Budget
    from adaptok.calibrating import calibrate
    from adaptok.calls import BlockCall, HostNumbers, TokenInput
    from adaptok.chunking import Chunker, ChunkPlan, Dechunker, Provenance
    from adaptok.compiling import compile
    from adaptok.dc import DCDiT, DCDiTConfig
    from adaptok.dc.upcycle import upcycle
    from adaptok.discovery import (
        available,
        describe,
        register_backbone,
        register_chunker,
        register_dechunker,
        register_router,
        register_stage,
    )
    from adaptok.doctoring import doctor
    from adaptok.explaining import explain
    from adaptok.hookspecs import hookimpl
    from adaptok.hosts import Backbone, HostInputs
    from adaptok.measure.benchmarking import benchmark
    from adaptok.measure.planner import Plan, plan, set_aside
    from adaptok.measure.warming import WarmUp, warm_up
    from adaptok.parts import PartConfig
    from adaptok.profiles import Profile
    from adaptok.reduce_stage import ReduceStage
    from adaptok.reductions import Moment, Reduction, Site
    from adaptok.routing import Context, Router, Routing
    from adaptok.stages import BlockRange, Effects, Stage
    from adaptok.tokens import Tokens
    from adaptok.tracing import collect_losses, request, trace
    from adaptok.wrap_config import WrapConfig
    from adaptok.wrapping import is_wrapped, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "AdaptiveBlocks",
    "AdaptokError",
    "Backbone",
    "BlockCall",
    "BlockRange",
    "Budget",
    "ChunkPlan",
    "Chunker",
    "Context",
    "DCDiT",
    "DCDiTConfig",
    "Dechunker",
    "Effects",
    "HostInputs",
    "HostNumbers",
    "ListBackbone",
    "Moment",
    "PartConfig",
    "Plan",
    "Profile",
    "Provenance",
    "ReduceStage",
    "Reduction",
    "Router",
    "Routing",
    "Site",
    "Stage",
    "TokenInput",
    "Tokens",
    "WarmUp",
    "WrapConfig",
    "available",
    "benchmark",
    "budget",
    "calibrate",
    "collect_losses",
    "compile",
    "describe",
    "doctor",
    "explain",
    "hookimpl",
    "is_wrapped",
    "load",
    "losses",
    "plan",
    "register_backbone",
    "register_chunker",
    "register_dechunker",
    "register_router",
    "register_stage",
    "request",
    "save",
    "set_aside",
    "set_budget",
    "trace",
    "unwrap",
    "upcycle",
    "warm_up",
    "wrap",
]

# Everything comes when it is asked for: the core imports no method, and `adaptok --help` no torch.
HOMES = {
    "AdaptiveBlocks": "blocks",
    "Backbone": "hosts",
    "BlockCall": "calls",
    "BlockRange": "stages",
    "Budget": "budgets",
    "ChunkPlan": "chunking",
    "Chunker": "chunking",
    "Context": "routing",
    "DCDiT": "dc",
    "DCDiTConfig": "dc",
    "Dechunker": "chunking",
    "Effects": "stages",
    "HostInputs": "hosts",
    "HostNumbers": "calls",
    "ListBackbone": "backbones.plain",
    "Moment": "reductions",
    "PartConfig": "parts",
    "Plan": "measure.planner",
    "Profile": "profiles",
    "Provenance": "chunking",
    "ReduceStage": "reduce_stage",
    "Reduction": "reductions",
    "Router": "routing",
    "Routing": "routing",
    "Site": "reductions",
    "Stage": "stages",
    "TokenInput": "calls",
    "Tokens": "tokens",
    "WarmUp": "measure.warming",
    "WrapConfig": "wrap_config",
    "available": "discovery",
    "benchmark": "measure.benchmarking",
    "budget": "budgeted",
    "calibrate": "calibrating",
    "collect_losses": "tracing",
    "compile": "compiling",
    "describe": "discovery",
    "doctor": "doctoring",
    "explain": "explaining",
    "hookimpl": "hookspecs",
    "is_wrapped": "wrapping",
    "load": "adapters",
    "plan": "measure.planner",
    "register_backbone": "discovery",
    "register_chunker": "discovery",
    "register_dechunker": "discovery",
    "register_router": "discovery",
    "register_stage": "discovery",
    "request": "tracing",
    "save": "adapters",
    "set_aside": "measure.planner",
    "set_budget": "budgeted",
    "trace": "tracing",
    "unwrap": "wrapping",
    "upcycle": "dc.upcycle",
    "warm_up": "measure.warming",
    "wrap": "wrapping",
}
SUBMODULES = {
    "attention",
    "budgets",
    "chunking",
    "config",
    "dc",
    "diffusion",
    "losses",
    "measure",
    "routers",
    "routing",
    "see",
    "storage",
    "testing",
    "tokens",
    "train",
    "zoo",
}


def __getattr__(name: str) -> object:
    if name in SUBMODULES:
        return import_module(f"adaptok.{name}")
    if name not in HOMES:
        raise AttributeError(f"module 'adaptok' has no attribute {name!r}")
    value = getattr(import_module(f"adaptok.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
