"""DynamicWidth: heads and channels by the step, and tokens that skip the MLP."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok import BlockCall, BlockRange, Budget, Effects, Stage
from adaptok.budgets import Amount
from adaptok.errors import ConfigError, HandOverError, StackError
from adaptok_width.forms import WidthForm
from adaptok_width.gates import BlockGates, Shape
from adaptok_width.losses import anneal_target, width_loss
from adaptok_width.masks import BlockWidth, StepMasks
from adaptok_width.matching import find_forms
from adaptok_width.passes import pass_masked, pass_on_part, pass_whole
from adaptok_width.table import StepTable, mark_weights, round_step

MIB = 2**20
LOSS = "width"


class DynamicWidth(Stage):
    """Runs a part of each block's heads and MLP channels by the step, and its MLP on some tokens.

    In eval mode the weights of heads and channels that are off are cut out of the layers, and
    tokens that skip the MLP are gathered out, so that nothing of them is computed. Samples of one
    batch whose steps differ run in groups of equal steps. In training everything runs, and what is
    off is multiplied by zero (Gumbel-sigmoid, straight through); the loss `"width"` of
    `adaptok.collect_losses` pulls the share of operations to `target`.

    A fresh stage runs everything: it saves nothing until its routers are trained. It takes no
    budget of `adaptok.set_budget`, which counts the tokens that go into blocks; see
    `limit_tokens`.

    Args:
        target: share of the operations of the blocks that training aims at, in (0, 1].
        gate_heads: choose heads.
        groups: channel groups of an MLP; None takes as many as heads, 1 does not choose channels.
        gate_tokens: choose tokens for the MLP.
        steps: length of the host's scale of steps: 1000 for DiT, 1 for SiT.
        start: logit of everything in the beginning.
        temperature: of the sigmoid whose gradient decisions have.
        timesteps: steps that are tabulated from the beginning (see `tabulate`).
        cache_mb: how much memory cut weights of tabulated steps may take, in MiB.

    Raises:
        ConfigError: an option is out of range.
        StackError: (when wrapped) a block has no form for this; or there is nothing to choose.
        HandOverError: (when called) there is no diffusion step.

    Example:
        >>> import adaptok
        >>> from adaptok.dc.baseline import DiT
        >>> from adaptok.dc.config import DiTConfig
        >>> dit = DiT(DiTConfig(hidden_size=64, depth=3, num_heads=4, latent_size=8)).eval()
        >>> stage = DynamicWidth()
        >>> _ = adaptok.wrap(dit, stack=[stage])
        >>> stage.tabulate((900.0, 500.0, 100.0)).heads.all()
        tensor(True)

    Paper: Zhao et al., Dynamic Diffusion Transformer, arXiv 2410.03456; DyDiT++, arXiv 2504.06803.
    """

    effects: ClassVar[Effects] = Effects("width", needs_step=True)
    name: ClassVar[str] = "width"
    complete: bool = False  # everything runs: see `adaptok_width.full_width`

    def __init__(
        self,
        target: float = 0.5,
        gate_heads: bool = True,
        groups: int | None = None,
        gate_tokens: bool = True,
        steps: float = 1000.0,
        start: float = 5.0,
        temperature: float = 5.0,
        timesteps: tuple[float, ...] = (),
        cache_mb: float = 256.0,
    ) -> None:
        super().__init__()
        check_share("target", target)
        for option, value in (("steps", steps), ("start", start), ("temperature", temperature)):
            if not 0.0 < value < math.inf:
                raise ConfigError(f"{option} of 'width' is a finite number above 0, got {value!r}")
        if groups is not None and (isinstance(groups, bool) or groups < 1):
            raise ConfigError(f"groups of 'width' is a whole number of at least 1, got {groups!r}")
        if not 0.0 <= cache_mb < math.inf:
            raise ConfigError(f"cache_mb of 'width' is a finite number from 0 on, got {cache_mb!r}")
        if not gate_heads and groups == 1 and not gate_tokens:
            raise ConfigError("'width' has nothing to choose: neither heads, channels nor tokens")
        self.target, self.gate_heads, self.gate_tokens = target, gate_heads, gate_tokens
        self.groups = groups
        self.steps, self.start, self.temperature = steps, start, temperature
        self.timesteps, self.cache_mb = tuple(timesteps), cache_mb
        self.current_target = target
        self.gates: BlockGates | None = None  # made when the blocks are known
        self.table = StepTable(int(cache_mb * MIB))
        self.forms: dict[int, WidthForm] = {}
        self.limit = Budget()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what follows from weights: a copy makes it again."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "table": StepTable(self.table.limit), "forms": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.table.forget_weights()  # they lie elsewhere now
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def train(self, mode: bool = True) -> Self:
        """Train or not; weights that were cut are forgotten."""
        self.table.forget_weights()
        return super().train(mode)

    def meet(self, inner: BlockRange) -> None:
        """Look for the layers of the blocks, and make the routers (see `Stage.meet`)."""
        forms = find_forms(inner)
        sizes = {(form.heads, form.width, form.hidden) for form in forms}
        if len(sizes) > 1:
            raise StackError(
                "'width' needs blocks of one size, and these have (heads, width, channels) "
                f"{sorted(sizes)}: give a span of equal blocks"
            )
        ((heads, width, hidden),) = sizes
        block = type(forms[0].block).__name__
        if self.gate_heads and heads < 2:
            raise StackError(
                f"attention of {block} has one head, and the first one always runs: there is no "
                "head to choose. Give gate_heads=False"
            )
        groups = self.groups if self.groups is not None else heads
        if hidden % groups:
            raise StackError(
                f"{hidden} channels of the MLP of {block} cannot be cut into {groups} equal "
                "groups: let groups= divide them"
            )
        shape = Shape(inner.first, len(forms), heads, groups, width, hidden)
        if self.gates is None:
            self.gates = BlockGates(
                shape,
                gate_heads=self.gate_heads,
                gate_tokens=self.gate_tokens,
                steps=self.steps,
                start=self.start,
                temperature=self.temperature,
            )
            weight = forms[0].grow.weight
            self.gates.to(device=weight.device, dtype=weight.dtype)
            self.gates.train(self.training)
        elif self.gates.shape != shape:  # it has been in a wrap before
            raise StackError(
                f"this width stage was made for blocks like {self.gates.shape}, and these are "
                f"like {shape}: make a new one"
            )
        self.forms = dict(enumerate(forms, inner.first))
        self.table.forget_weights()

    def limit_tokens(
        self,
        *,
        keep: Amount | None = None,
        tokens: Amount | None = None,
        drop: Amount | None = None,
    ) -> None:
        """Say how many tokens run each MLP from now on; nothing given: the router's threshold.

        Like a budget, it belongs to the run and is not saved.

        Args:
            keep: share of the grid tokens of a block, one number or one per sample.
            tokens: exact count.
            drop: share of the tokens above the threshold to leave out.

        Raises:
            BudgetError: two of them came, or one is out of range.
            ConfigError: this stage does not choose tokens.
        """
        limit = Budget(keep=keep, tokens=tokens, drop=drop)
        if not self.gate_tokens:
            raise ConfigError("to rank tokens, 'width' needs gate_tokens=True")
        self.limit = limit

    def anneal(self, step: int, steps: int) -> float:
        """Set and return the target of a training step (see `anneal_target`)."""
        self.current_target = anneal_target(step, steps, self.target)
        return self.current_target

    def tabulate(self, timesteps: Sequence[float] | Tensor) -> StepMasks:
        """Decide for steps before they come, and keep the weights that will be cut for them.

        Masks and weights follow the model: what changes is made again, and a state dict holds
        neither. Only a write through `.data` is not seen; tabulate again after one.

        Args:
            timesteps: the steps that a sampler will take, on the host's own scale; none forgets
                what was tabulated.

        Returns:
            The masks.
        """
        given = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
        self.timesteps = tuple(round_step(t) for t in given)
        self.table = StepTable(self.table.limit)
        return self.read_masks(self.timesteps)

    def read_masks(self, timesteps: Sequence[float]) -> StepMasks:
        """Return which heads and groups run at some steps."""
        shape = self.require_gates().shape
        rows = [self.find_widths(round_step(t), slice(None)) for t in timesteps]
        heads = torch.zeros(len(rows), shape.blocks, shape.heads, dtype=torch.bool)
        groups = torch.zeros(len(rows), shape.blocks, shape.groups, dtype=torch.bool)
        for step, row in enumerate(rows):
            for block, found in enumerate(row):
                heads[step, block, list(found.heads)] = True
                groups[step, block, list(found.groups)] = True
        return StepMasks(tuple(timesteps), heads, groups)

    def find_widths(self, timestep: float, blocks: slice) -> tuple[BlockWidth, ...]:
        """Return what runs in some blocks at a step, tabulated or not."""
        gates = self.require_gates()
        mark = mark_weights([gates.step.weight, gates.step.bias])
        if mark != self.table.mark:
            self.table.mark = mark
            self.table.widths = {
                t: gates.decide(t, slice(None)) for t in map(round_step, self.timesteps)
            }
        known = self.table.widths.get(timestep)
        return gates.decide(timestep, blocks) if known is None else known[blocks]

    def require_gates(self) -> BlockGates:
        """Return the routers, or raise a `StackError` if this stage is in no wrap yet."""
        if self.gates is None:
            raise StackError(
                "this width stage has seen no blocks yet: adaptok.wrap(model, stack=[stage])"
            )
        return self.gates

    def describe(self) -> dict[str, str]:
        """Return options, and what is kept."""
        kept = f"{self.table.memory_bytes / MIB:.1f} of {self.cache_mb:g} MiB"
        return {
            "stage": repr(self.name),
            "target": repr(self.target),
            "mlp_tokens": repr("by router" if self.limit.is_natural else self.limit.describe()),
            "tabulated": repr(f"{len(self.timesteps)} steps, {kept}"),
        }

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run the inner blocks on a part of their width (see `Stage.forward`)."""
        gates = self.require_gates()
        if call.timestep is None:
            raise HandOverError(
                "'width' chooses heads and channels by the diffusion step, and this host handed "
                "none over; for adaptok.ListBackbone name the argument, timestep="
            )
        forms = self.find_forms(inner)
        if self.complete:
            return call.with_x(pass_whole(forms, call))
        begin = inner.first - gates.shape.first
        if self.training:
            x, ratio = pass_masked(gates, forms, call, self.limit, begin)
        else:
            x, ratio = self.run_groups(forms, call, begin)
        for observer in call.observers:
            if observer.wants_losses:
                # where another stage runs blocks piece by piece, pieces count by their length
                share = len(forms) / gates.shape.blocks
                loss = share * width_loss(ratio, self.current_target)
                observer.note_losses({LOSS: loss})
        return call.with_x(x)

    def find_forms(self, inner: BlockRange) -> tuple[WidthForm, ...]:
        """Return the forms of the blocks, found again if a block is another one now."""
        numbers = range(inner.first, inner.last)
        modules = [inner.module(number) for number in numbers]
        known = [self.forms[number].block for number in numbers if number in self.forms]
        if [id(block) for block in known] != [id(block) for block in modules]:
            self.forms.update(zip(numbers, find_forms(inner), strict=True))
        return tuple(self.forms[number] for number in numbers)

    def run_groups(
        self, forms: Sequence[WidthForm], call: BlockCall, begin: int
    ) -> tuple[Float[Tensor, "b s d"], Float[Tensor, " b"]]:
        """Run blocks in groups of samples whose steps are equal (see `pass_on_part`)."""
        gates = self.require_gates()
        assert call.timestep is not None
        times: list[float] = call.timestep.float().tolist()
        members: dict[float, list[int]] = {}
        for sample, time in enumerate(times):
            members.setdefault(time, []).append(sample)
        x, ratio = call.x, call.x.new_zeros(len(times), dtype=torch.float32)
        for time, samples in members.items():
            widths = self.find_widths(time, slice(begin, begin + len(forms)))
            # weights that are cut with a gradient belong to one call
            kept = time in self.table.widths and not torch.is_grad_enabled()
            cut = self.table if kept else None
            if len(members) == 1:
                return pass_on_part(gates, forms, call, widths, cut, self.limit, begin)
            index = torch.tensor(samples, device=call.x.device)
            part = call.select(index)
            out, share = pass_on_part(gates, forms, part, widths, cut, self.limit, begin)
            x, ratio = x.index_copy(0, index, out), ratio.index_copy(0, index, share)
        return x, ratio


def check_share(option: str, value: float) -> None:
    """Raise a `ConfigError` unless an option is a share in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"{option} of 'width' is a share in (0, 1], got {value!r}")
