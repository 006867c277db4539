"""Weights of published DC-DiT checkpoints: their names, both ways."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adaptok.errors import CheckpointError

# (name here, name there), matched at the start of a name
RENAMES: tuple[tuple[str, str], ...] = (
    ("embed.", "x_embedder.proj."),
    ("timestep_embedder.mlp.", "t_embedder.mlp."),
    ("label_embedder.table.", "y_embedder.embedding_table."),
    ("position", "pos_embed"),
    ("encoder.blocks.", "hnet.encoder.layers."),
    ("encoder.norm.", "hnet.encoder.rmsnorm."),
    ("router.project.", "hnet.routing_module.proj."),
    ("router.predict.", "hnet.routing_module.context_predictor."),
    ("router.score.", "hnet.routing_module.residual_scorer."),
    ("backbone.blocks.", "hnet.main_network.main_network.layers."),
    ("backbone.norm.", "hnet.main_network.main_network.rmsnorm."),
    ("dechunker.residual.", "hnet.residual_proj."),
    ("decoder.blocks.", "hnet.decoder.layers."),
    ("decoder.norm.", "hnet.decoder.rmsnorm."),
    ("final_layer.", "final_layer."),
)
# (name here, name there) of parts within blocks
INNER_RENAMES: tuple[tuple[str, str], ...] = (
    (".condition.", ".cond_proj."),
    (".skip.", ".skip_proj."),
    (".modulation.", ".adaLN_modulation."),
)
POSITION_TOLERANCE = 1e-2  # half precision of a table of sines is still a table of sines


def rename_to_reference(name: str) -> str:
    """Return the published name of a weight of `DCDiT`.

    Example:
        >>> rename_to_reference("encoder.blocks.0.condition.1.bias")
        'hnet.encoder.layers.0.cond_proj.1.bias'
    """
    return rename(name, [*RENAMES], [*INNER_RENAMES])


def rename_from_reference(name: str) -> str:
    """Return the name in `DCDiT` of a published weight."""
    outer = [(there, here) for here, there in RENAMES]
    inner = [(there, here) for here, there in INNER_RENAMES]
    return rename(name, outer, inner)


def rename(name: str, outer: list[tuple[str, str]], inner: list[tuple[str, str]]) -> str:
    """Replace the start of a name, and the parts within it; unknown names stay."""
    for old, new in outer:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in inner:
        name = re.sub(re.escape(old), new, name)
    return name


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a state dict of `DCDiT` the published names."""
    return {rename_to_reference(name): value for name, value in state.items()}


def from_reference(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give published weights the names of `DCDiT`, and check that they fit a model.

    Args:
        weights: tensors by published name.
        model: the model that they are for.

    Returns:
        A state dict for that model.

    Raises:
        CheckpointError: a name is missing or unknown, a shape differs, or the position table
            is not the fixed one.
    """
    state = {rename_from_reference(name): value for name, value in weights.items()}
    check_state(state, model.state_dict())
    came, fixed = (s["position"].float().cpu() for s in (state, model.state_dict()))
    if not torch.allclose(came, fixed, atol=POSITION_TOLERANCE):
        raise CheckpointError(
            "pos_embed is not the fixed sine-cosine table of this latent size: the weights are "
            "of another model"
        )
    return state


def check_state(state: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Raise a `CheckpointError` unless a state dict has the needed names and shapes.

    Args:
        state: what came.
        needed: a state dict of the model.

    Raises:
        CheckpointError: with the first names that are missing, unknown or of another shape.
    """
    problems = []
    missing = sorted(needed.keys() - state.keys())
    unknown = sorted(state.keys() - needed.keys())
    if missing:
        problems.append(f"{len(missing)} missing ({', '.join(missing[:3])})")
    if unknown:
        problems.append(f"{len(unknown)} unknown ({', '.join(unknown[:3])})")
    for name in sorted(needed.keys() & state.keys()):
        if state[name].shape != needed[name].shape:
            came, wanted = tuple(state[name].shape), tuple(needed[name].shape)
            problems.append(f"{name} has the shape {came} instead of {wanted}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"these weights do not fit the model: {'; '.join(problems[:4])}{more}. Make the "
            "model with the configuration that they were trained with"
        )
