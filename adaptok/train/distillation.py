"""Distillation of an upcycled model: each new part learns to reproduce what it replaces."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.budgets import Budget
from adaptok.dc.config import DCDiTConfig
from adaptok.dc.folder import load_model
from adaptok.dc.host_dit import HostDiT, read_host
from adaptok.dc.model import DCDiT
from adaptok.dc.upcycle import check_blocks, plan_config, take_over
from adaptok.errors import ConfigError, UnsupportedModelError
from adaptok.losses import ratio_loss
from adaptok.routing import Context
from adaptok.tokens import Tokens
from adaptok.train.batches import Batch, make_latents
from adaptok.train.config import TrainConfig


@dataclass(frozen=True, slots=True, eq=False)
class TeacherAnswer:
    """What a fixed-patch DiT computes on its way.

    Args:
        patches: embedded patches without their positions, `(b d h w)`.
        tokens: what comes out of its blocks, `(b m d)`, rows of patches first.
        output: what it gives, `(b c h2 w2)`.
    """

    patches: Float[Tensor, "b d h w"]
    tokens: Float[Tensor, "b m d"]
    output: Float[Tensor, "b c h2 w2"]


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """A fixed-patch DiT that a new scaffold learns from.

    Args:
        host: the DiT, in eval mode and without gradients.
    """

    host: HostDiT

    @classmethod
    def read(cls, dit: nn.Module) -> "Teacher":
        """Make a teacher of a DiT, which is put into eval mode and learns nothing any more."""
        return cls(read_host(dit.eval().requires_grad_(False)))

    def answer(self, x: Tensor, t: Tensor, y: Tensor) -> TeacherAnswer:
        """Run the DiT and return what it computes on its way.

        Args:
            x: noisy latents, `(b c h w)`.
            t: diffusion times, `(b)`.
            y: labels, `(b)`.

        Returns:
            Patches, tokens and output.

        Raises:
            UnsupportedModelError: its patches or blocks were not run once.
        """
        host = self.host
        with torch.no_grad(), seen_outputs(host.patch_embed, host.blocks[-1]) as seen:
            out = host.model(x, t, y) if host.frequency_shift == 0 else run_diffusers(host, x, t, y)
        if len(seen) != 2:
            raise UnsupportedModelError("the teacher's patches and last block are not run once")
        if isinstance(out, tuple):
            out = out[0]
        return TeacherAnswer(seen[0], seen[1], out)


def run_diffusers(host: HostDiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Call diffusers' DiT, which has other names for its arguments."""
    out: Tensor = host.model(x, timestep=t, class_labels=y, return_dict=False)[0]
    return out


@contextmanager
def seen_outputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Yield what modules give, in the order in which they run, while the block runs."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: object, out: Tensor) -> None:
        seen.append(out)

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def plan_upcycling(
    config: TrainConfig,
    host: str | Path,
    distill_steps: int,
    **options: Any,  # noqa: ANN401
) -> TrainConfig:
    """Return a run that upcycles, distils and fine-tunes a DiT of `adaptok train --model dit`.

    Args:
        config: the run; its model is replaced.
        host: folder of the DiT.
        distill_steps: steps at the start in which the new parts learn from it.
        **options: of the model, as `adaptok.upcycle` takes them.

    Returns:
        The run, for `adaptok.train.trainer.train`.

    Raises:
        CheckpointError: there is no model in the folder.
        UnsupportedModelError: it cannot be upcycled.
        ConfigError: an option is out of range.
    """
    defaults = {
        "latent_size": None,
        "layout": "packed",
        "target": None,
        "dechunk_sigma": 1.0,
        "narrowing": 4,
    }
    unknown = sorted(options.keys() - defaults.keys())
    if unknown:
        raise ConfigError(f"upcycling has no option {', '.join(unknown)}: known are {[*defaults]}")
    model = plan_config(read_host(load_model(host).model), **(defaults | options))
    values = {name: getattr(config, name) for name in type(config).model_fields}
    new = {"model": model, "host": str(host), "distill_steps": distill_steps}
    return TrainConfig(**(values | new))


def start_from_host(config: TrainConfig, device: torch.device) -> tuple[DCDiT, Teacher]:
    """Make the model of a run around the blocks of its host, and the host a teacher.

    Args:
        config: a run with a `host`.
        device: where they lie.

    Returns:
        The model in training mode, and the teacher.

    Raises:
        ConfigError: the model of the run is not one around the blocks of this host.
        CheckpointError: there is no model in the host's folder.
        UnsupportedModelError: it cannot be upcycled.
    """
    assert config.host is not None
    assert isinstance(config.model, DCDiTConfig)
    teacher = Teacher.read(load_model(config.host).model.to(device))
    host, model = teacher.host, DCDiT(config.model)
    out = config.model.out_channels
    if (host.width, len(host.blocks), host.out_channels) != (
        config.model.hidden_size,
        config.model.depth,
        out,
    ):
        raise ConfigError(
            f"the model of this run has {config.model.depth} blocks of width "
            f"{config.model.hidden_size} and {out} output channels, and its host {config.host} has "
            f"{len(host.blocks)} of width {host.width} and {host.out_channels}: let "
            "`plan_upcycling` make the model"
        )
    take_over(model, host)
    model.to(device)
    check_blocks(model, host)
    return model.train(), teacher


def measure_distillation(
    model: DCDiT,
    teacher: Teacher,
    config: TrainConfig,
    batch: Batch,
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, Tensor]:
    """Say how far each new part is from what it replaces, on a batch.

    The cells that the encoder makes are compared with the embedded patch that they lie in;
    decoder and final layer are given what came out of the teacher's blocks, at the cells that
    the router keeps, and compared with the teacher's output. The blocks are not run, so that no
    gradient reaches them.

    Args:
        model: the upcycled model.
        teacher: the DiT whose blocks it has.
        config: the run.
        batch: on the device of the model.
        autocast: context in which both run.

    Returns:
        Scalars by name: `loss` (what is trained on), `patches` and `output` (squared distance as a
        share of the teacher's variance), `ratio`, `kept` and `natural`.
    """
    objective = config.make_objective()
    x0 = make_latents(batch.images, config.space_to_depth)
    t = objective.times(batch.u)
    x, time = objective.noisy(x0, batch.noise, t), objective.model_time(t)
    with autocast or nullcontext():
        said = teacher.answer(x, time, batch.labels)
        condition = model.timestep_embedder(time) + model.label_embedder(batch.labels)
        cells = model.encode(x, condition)
        # the encoder learns from the patches alone, router and decoder from the output
        before = Tokens(cells.detach(), (x.shape[2], x.shape[3]))
        routing = model.router(before, Context(condition=condition, timestep=time))
        kept, plan = model.chunker(before, routing, Budget(drop=0.0))
        p = teacher.host.patch_size
        h, w = said.patches.shape[-2:]
        known = repeat(said.tokens, "b (h w) d -> (b h p w q) d", h=h, w=w, p=p, q=p)
        normed = model.backbone.norm(known.index_select(0, plan.rows).float())
        out = model.decode(model.dechunker(kept.with_x(normed), plan, before), condition)
    wanted = repeat(said.patches, "b d h w -> b (h p w q) d", p=p, q=p)
    assert isinstance(config.model, DCDiTConfig)
    ratio = ratio_loss(plan.routing, config.model.target, config.ratio_group)
    patches, output = share_of_variance(cells, wanted), share_of_variance(out, said.output)
    assert plan.routing.keep_mask is not None
    assert plan.routing.natural_mask is not None
    return {
        "loss": patches + output + config.ratio_weight * ratio,
        "patches": patches,
        "output": output,
        "ratio": ratio,
        "kept": plan.routing.keep_mask.float().mean(),
        "natural": plan.routing.natural_mask.float().mean(),
    }


def share_of_variance(x: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """Return the squared distance to a target as a share of the target's variance."""
    wanted = rearrange(target.float(), "b ... -> (b ...)")
    variance = wanted.var(unbiased=False).clamp(min=1e-12)
    return (x.float().flatten() - wanted).square().mean() / variance
