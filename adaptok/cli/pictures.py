"""From what a model drew to what a picture shows."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from adaptok.dc.baseline import DiT
from adaptok.dc.folder import ModelCard, TrainedModel
from adaptok.diffusion import Objective, Samples, make_objective
from adaptok.errors import LabelError
from adaptok.see import Frame, KeptCurve
from adaptok.train.pixels import depth_to_space, to_uint8


def to_pixels(latents: Float[Tensor, "b c h w"], card: ModelCard) -> UInt8[Tensor, "b 3 h2 w2"]:
    """Turn latents of a pixel model into RGB images.

    Args:
        latents: what the model drew, in [-1, 1].
        card: says how many pixels a cell holds.

    Returns:
        The images.
    """
    return to_uint8(depth_to_space(latents.cpu(), card.space_to_depth))


def objective_of(card: ModelCard) -> Objective:
    """Return what a model was trained for; a shift of the times comes from its card."""
    if card.objective != "flow":
        return make_objective(card.objective)
    run = card.training.get("config")
    return make_objective(
        "flow", shift=run.get("flow_shift", 1.0) if isinstance(run, dict) else 1.0
    )


def read_label(text: str, trained: TrainedModel) -> int:
    """Find the class that a person means.

    Args:
        text: a name, a number, a part of a name that fits only one class, or `none`; where classes
            are called by numbers, the name counts.
        trained: the model, whose card names the classes.

    Returns:
        The label.

    Raises:
        LabelError: no class fits, or several do.
    """
    count, names = trained.model.config.num_classes, trained.card.class_names
    known = ", ".join(f"{i} {name}" for i, name in enumerate(names)) or f"0 to {count - 1}"
    wanted = text.strip().casefold()
    if wanted == "none":
        return count
    exact = [i for i, name in enumerate(names) if name.casefold() == wanted]
    if not exact and re.fullmatch("-?[0-9]+", wanted):  # classes may be called by numbers
        if 0 <= int(wanted) < count:
            return int(wanted)
        raise LabelError(f"there is no class {wanted}: the classes are {known}, or none")
    fitting = exact or [i for i, name in enumerate(names) if wanted in name.casefold()]
    if len(fitting) != 1 or not wanted:
        problem = "fits several classes" if len(fitting) > 1 and wanted else "is no class"
        raise LabelError(f"the label {text!r} {problem}: the classes are {known}, or none")
    return fitting[0]


def name_label(label: int, card: ModelCard) -> str:
    """Return the name of a class, or its number."""
    if not card.class_names:
        return f"class {label}"
    return card.class_names[label] if label < len(card.class_names) else "no class"


@contextmanager
def record_inputs(model: nn.Module) -> Iterator[list[Float[Tensor, "b c h w"]]]:
    """Record what a model is given, call by call, while the block runs.

    Args:
        model: `DCDiT` or `DiT`.

    Yields:
        A list that grows with every call.
    """
    seen: list[Tensor] = []
    first = model.x_embedder if isinstance(model, DiT) else model.embed
    assert isinstance(first, nn.Module)
    handle = first.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].detach().float().cpu())
    )
    try:
        yield seen
    finally:
        handle.remove()


def make_frames(
    samples: Samples,
    inputs: Sequence[Float[Tensor, "b c h w"]],
    card: ModelCard,
    *,
    image: int,
    count: int,
) -> list[Frame]:
    """Choose steps of one image's trajectory, evenly from the first to the last.

    Args:
        samples: traced samples of a model with a router.
        inputs: what the model was given in each step.
        card: how to show latents.
        image: which image.
        count: how many steps to show.

    Returns:
        The frames, the noisiest first.
    """
    last = len(samples.steps) - 1
    chosen = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
    frames = []
    for index in chosen:
        step = samples.steps[index]
        assert step.keep_prob is not None
        assert step.keep_mask is not None
        assert step.grid is not None
        pair = torch.stack([inputs[index][image], step.x0[image].cpu()])
        noisy, clean = to_pixels(pair, card)
        frames.append(
            Frame(
                noise=step.time / 1000,
                noisy=noisy,
                clean=clean,
                keep_prob=step.keep_prob[image].cpu(),
                keep_mask=step.keep_mask[image].cpu(),
                grid=step.grid,
            )
        )
    return frames


def make_curve(name: str, samples: Samples) -> KeptCurve:
    """Return the kept fraction of each step and image.

    Args:
        name: the budget in words.
        samples: traced samples of a model with a router.

    Returns:
        The curve.
    """
    masks = [step.keep_mask for step in samples.steps]
    kept = torch.stack([mask.float().mean(1).cpu() for mask in masks if mask is not None])
    return KeptCurve(name, tuple(step.time / 1000 for step in samples.steps), kept.numpy())
