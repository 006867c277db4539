"""One optimiser step: loss, gradients, weights, averaged weights, and what was measured."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptok.dc import DCDiT
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DCDiTConfig
from adaptok.dc.folder import build_model
from adaptok.losses import ratio_loss
from adaptok.train.batches import Batch, make_latents
from adaptok.train.checkpoint import Checkpoint, check_tensors, collect_moments, restore_moments
from adaptok.train.config import TrainConfig, drop_at, ema_decay_at, learning_rate_at
from adaptok.train.distillation import Teacher, measure_distillation, start_from_host
from adaptok.train.sharding import Sharding, gather_whole, local_part, shard_like, shard_model

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Reduce = Callable[[Tensor], Tensor]


def make_model(
    config: TrainConfig, device: torch.device
) -> tuple[DCDiT, Teacher] | tuple[DCDiT | DiT, None]:
    """Make the model of a run; its first weights follow from the seed, and from its host.

    Args:
        config: the run.
        device: where it lies.

    Returns:
        The model in training mode, and the host that it may learn from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.host is not None:
            return start_from_host(config, device)
        return build_model(config.model).to(device).train(), None


def compile_parts(model: DCDiT | DiT, backend: str = "inductor", *, sharded: bool = False) -> None:
    """Compile the parts of a model in place, which changes no name in its state dict.

    The whole model does not compile into one graph, since the number of kept tokens is only
    known in the middle of it; the blocks see a new number in each step, so theirs is dynamic.

    Args:
        model: the model.
        backend: of `torch.compile`.
        sharded: the model will be sharded, so that each block is a part of its own.
    """

    def compile_part(part: nn.Module, dynamic: bool | None = None) -> None:
        if sharded:  # hooks around `forward` collect its weights: they stay outside of the graph
            part.forward = torch.compile(part.forward, backend=backend, dynamic=dynamic)
        else:
            part.compile(backend=backend, dynamic=dynamic)

    if isinstance(model, DCDiT):
        stacks = (model.encoder, model.decoder)
        ends = [block for stack in stacks for block in stack.blocks] if sharded else stacks
        for part in (*ends, model.router, model.final_layer):
            compile_part(part)
        for block in (*model.backbone.blocks, model.backbone.norm):
            compile_part(block, dynamic=True)
    else:
        for block in model.blocks:
            compile_part(block)


def measure_loss(
    model: nn.Module,
    config: TrainConfig,
    batch: Batch,
    drop: float,
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, Tensor]:
    """Say how wrong a model is on a batch.

    Args:
        model: `DCDiT` or `DiT`, or a wrapper around one.
        config: the run.
        batch: on the device of the model.
        drop: tail-drop fraction.
        autocast: context in which the model runs.

    Returns:
        Scalars by name: `loss` (what is trained on), the terms of the objective, and with a
        router `ratio`, `kept` and `natural`.
    """
    objective = config.make_objective()
    x0 = make_latents(batch.images, config.space_to_depth)
    t = objective.times(batch.u)
    x, time = objective.noisy(x0, batch.noise, t), objective.model_time(t)
    adaptive = isinstance(config.model, DCDiTConfig)
    with autocast or nullcontext():
        prediction, routing = model(
            x, time, batch.labels, drop=drop if adaptive else None, return_routing=True
        )
    losses = objective.loss(prediction, x0, batch.noise, t)
    measures = {"loss": losses.total.mean()}
    measures |= {name: part.mean() for name, part in losses.parts.items()}
    if isinstance(config.model, DCDiTConfig):
        ratio = ratio_loss(routing, config.model.target, config.ratio_group)
        measures["loss"] = measures["loss"] + config.ratio_weight * ratio
        measures["ratio"] = ratio
        measures["kept"] = routing.keep_mask.float().mean()
        measures["natural"] = routing.natural_mask.float().mean()
    return measures


def list_weights(model: nn.Module) -> list[Tensor]:
    """Return what this process holds of the state dict of a model."""
    return [local_part(value) for value in model.state_dict().values()]


def average_weights(averages: list[Tensor], weights: list[Tensor], decay: float) -> None:
    """Move averaged weights towards the current ones, in place.

    One fused call for all tensors: `torch.optim.swa_utils.AveragedModel` does the same, but it
    copies the module, which a compiled or wrapped one does not survive with its names.

    Args:
        averages: averaged weights, float32.
        weights: current weights, in the same order.
        decay: share of the average that stays.
    """
    with torch.no_grad():
        torch._foreach_lerp_(averages, weights, 1.0 - decay)


@dataclass(slots=True, eq=False)
class Window:
    """What was measured since the last report, summed on the device so that no step waits.

    Args:
        names: what is measured.
        sums: its sums in the same order.
        steps: how many steps are in the sums.
    """

    names: tuple[str, ...] = ()
    sums: Tensor | None = None
    steps: int = 0

    def add(self, measures: Mapping[str, Tensor]) -> None:
        """Add what a step measured."""
        row = torch.stack([value.detach().float() for value in measures.values()])
        self.names = tuple(measures)
        self.sums = row if self.sums is None else self.sums + row
        self.steps += 1

    def read(self, reduce: Reduce) -> dict[str, float]:
        """Bring the sums to the host; the device is waited for."""
        if self.sums is None:
            return {}
        return dict(zip(self.names, reduce(self.sums).tolist(), strict=True))


@dataclass(slots=True, eq=False)
class Learner:
    """The model of a run and all that changes with it from step to step.

    Args:
        config: the run.
        model: the model.
        optimizer: of its trained parameters, in one group.
        names: names of those parameters, in the same order.
        ema: averaged weights by name, for the whole state dict.
        scaler: loss scaling, off unless the precision is fp16.
        forward: the model, or the wrapper of several processes around it.
        weights: the tensors of the state dict, in the order of `ema`; of sharded ones the part
            that this process holds.
        window: what was measured since the last report.
        bad_step: the first step whose loss or gradient was not finite, or -1.
        teacher: the host whose blocks the model has.
    """

    config: TrainConfig
    model: DCDiT | DiT
    optimizer: torch.optim.AdamW
    names: tuple[str, ...]
    ema: dict[str, Tensor]
    scaler: torch.amp.GradScaler
    forward: nn.Module
    weights: list[Tensor]
    bad_step: Tensor
    teacher: Teacher | None = None
    window: Window = field(default_factory=Window)

    @classmethod
    def start(
        cls, config: TrainConfig, device: torch.device, sharding: Sharding | None = None
    ) -> "Learner":
        """Make the learner that a run starts with.

        Args:
            config: the run.
            device: where it computes.
            sharding: how several processes share the model; None gives each all of it.

        Returns:
            A learner that has done no step.
        """
        # A model that is to be shared may be larger than the device of one process.
        model, teacher = make_model(config, torch.device("cpu") if sharding else device)
        if config.compile:
            compile_parts(model, sharded=sharding is not None)
        if sharding is not None:
            shard_model(model, device, sharding)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            trained.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        return cls(
            config=config,
            model=model,
            optimizer=optimizer,
            names=tuple(trained),
            ema={name: value.detach().clone() for name, value in model.state_dict().items()},
            scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
            forward=model,
            weights=list_weights(model),
            bad_step=torch.full((), -1, device=device),
            teacher=teacher,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint.

        Args:
            checkpoint: of the same run.

        Raises:
            CheckpointError: its tensors are not those of this model.
        """
        learnt = self.names
        if checkpoint.state.step <= (self.config.distill_steps or 0):  # blocks have no moments yet
            learnt = tuple(name for name in learnt if not name.startswith("backbone.blocks."))
        check_tensors(checkpoint, self.model.state_dict(), learnt)
        self.model.load_state_dict(
            {name: shard_like(checkpoint.model[name], own) for name, own in self.ema.items()}
        )
        restore_moments(self.optimizer, self.names, checkpoint.optimizer)
        for name, value in self.ema.items():
            value.copy_(shard_like(checkpoint.ema[name], value))
        state = checkpoint.state
        if state.scaler:
            self.scaler.load_state_dict(dict(state.scaler))
        if state.window_steps:
            sums = torch.tensor(list(state.window.values()), device=self.bad_step.device)
            self.window = Window(tuple(state.window), sums, state.window_steps)

    def wrap(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        """Let several processes learn together.

        Args:
            prepare: makes the wrapper around the model; it may move the weights.
        """
        self.forward = prepare(self.model)
        self.weights = list_weights(self.model)

    def moments(self) -> dict[str, Tensor]:
        """Return the state of the optimiser by the names of the parameters."""
        return collect_moments(self.optimizer, self.names)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the model runs."""
        dtype = AUTOCAST_DTYPES.get(self.config.precision)
        if dtype is None:
            return nullcontext()
        return torch.autocast(self.bad_step.device.type, dtype)

    def take_step(self, batch: Batch, step: int) -> None:
        """Learn from one batch; nothing is read back, so that a GPU never waits for the host.

        Args:
            batch: this process's share, on its device.
            step: number of the step, from 0.
        """
        measures = self.collect_gradients(batch, step)
        measures["gradient_norm"] = self.clip_gradients()
        self.update_weights(step)
        self.note_bad_step(measures, step)
        self.window.add(measures)

    def collect_gradients(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Compute the gradients of a batch, and exchange them between processes.

        Args:
            batch: this process's share, on its device.
            step: number of the step, from 0.

        Returns:
            What was measured, means over this process's share.
        """
        parts = self.config.accumulation
        measures: dict[str, Tensor] = {}
        for number, piece in enumerate(batch.split(parts)):
            # Gradients are exchanged between processes once, with the last micro-batch. Sharded
            # ones are with each: whole gradients of all weights are what sharding avoids.
            with self.without_exchange() if number + 1 < parts else nullcontext():
                found = self.measure(piece, step)
                self.scaler.scale(found["loss"] / parts).backward()
            for name, value in found.items():
                share = value.detach() / parts
                measures[name] = measures[name] + share if name in measures else share
        return measures

    def measure(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Say how wrong the model is on a batch, in the way that this step trains."""
        config = self.config
        if self.teacher is not None and step < (config.distill_steps or 0):
            assert isinstance(self.model, DCDiT)
            return measure_distillation(self.model, self.teacher, config, batch, self.autocast())
        return measure_loss(self.forward, config, batch, drop_at(config, step), self.autocast())

    def without_exchange(self) -> AbstractContextManager[Any]:
        """Return a context in which gradients stay in this process."""
        no_sync = getattr(self.forward, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()

    def clip_gradients(self) -> Tensor:
        """Shorten the gradients to the limit, and return their norm before."""
        self.scaler.unscale_(self.optimizer)
        limit = self.config.gradient_clip
        norm = nn.utils.clip_grad_norm_(
            self.optimizer.param_groups[0]["params"], math.inf if limit is None else limit
        )
        return gather_whole(norm)

    def update_weights(self, step: int) -> None:
        """Change weights and averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.config, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        averages = [local_part(value) for value in self.ema.values()]
        average_weights(averages, self.weights, ema_decay_at(self.config, step))

    def note_bad_step(self, measures: Mapping[str, Tensor], step: int) -> None:
        """Remember the first step that went wrong, without looking at it now."""
        good = measures["loss"].isfinite()
        if not self.scaler.is_enabled():  # with loss scaling such a step is left out, as it should
            good = good & measures["gradient_norm"].isfinite()
        self.bad_step = torch.where(good | (self.bad_step >= 0), self.bad_step, step + 1)
