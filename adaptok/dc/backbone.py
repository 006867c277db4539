"""The adapter of the reference model: stages around the blocks that run on its short tokens."""

from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from adaptok.attention import Ragged
from adaptok.calls import BlockCall, HostNumbers, Part
from adaptok.dc.model import DCDiT
from adaptok.dc.nearest import find_nearest
from adaptok.errors import HandOverError, UnsupportedModelError
from adaptok.hosts import Backbone, HostInputs, device_of, dtype_of, require
from adaptok.standing import Standing

BRANCHES = ("cond", "uncond")  # forward_with_cfg: the first half has the classes


class DCDiTBackbone(Backbone):
    """Adapter of `adaptok.DCDiT`: what it wraps are the blocks behind the model's own chunker.

    The grid of a call is the line of tokens that the model kept, since its chunker has taken the
    image's grid apart already; samples that keep as many run together. A budget of the wrapped
    model is one of the model's own chunker and of each stage in turn: `keep=0.5` with merging
    inside leaves a quarter in the end.

    Example:
        >>> import adaptok
        >>> config = adaptok.DCDiTConfig(hidden_size=64, depth=2, num_heads=2, latent_size=8)
        >>> DCDiTBackbone.match(adaptok.DCDiT(config)).depth
        2
    """

    name = "dcdit"
    family = "adaptok.DCDiT"
    versions = "this one"
    branches = BRANCHES
    timestep_scale = (999.0, 0.0)
    has_step = True
    has_grid = False

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a reference model (see `Backbone.match`)."""
        require(isinstance(model, DCDiT), "no adaptok.DCDiT")
        assert isinstance(model, DCDiT)
        if model.compiled_regions:
            raise UnsupportedModelError(
                "a DCDiT is wrapped before it is compiled: adaptok.compile(adaptok.wrap(model, "
                "...)) is not supported, run it as it is"
            )
        config = model.config
        return cls(
            containers=("backbone.blocks",),
            width=config.hidden_size,
            depth=config.depth,
            grid_axes=1,
        )

    def entrances(self, model: nn.Module) -> tuple[str, ...]:
        """Listen to the embeddings of latent and time, and to which cells the model keeps."""
        return ("embed", "timestep_embedder", "chunker", "cell_codes")

    def hand_over(
        self, entrance: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostNumbers | None:
        """Return the branches, the step, what is kept and why (see `Backbone.hand_over`)."""
        if entrance == "chunker":
            return HostNumbers((), routing=args[1])
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        if entrance == "cell_codes":
            return HostNumbers((), cells=given, cell_grid=args[1])
        if entrance == "timestep_embedder":
            return HostNumbers((), timestep=given)
        b, _, h, w = given.shape
        return HostNumbers((h, w), start=0, branches=BRANCHES if b % 2 == 0 else ())

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall | tuple[BlockCall, ...]:
        """Return one call for all samples that keep as many tokens (see `Backbone.read`)."""
        x, condition, ragged = args
        b = condition.shape[0]
        if ragged is None:
            return self.make_call(x, condition, numbers, None)
        if not isinstance(ragged, Ragged) or len(ragged.lengths) != b:
            raise HandOverError("the blocks of DCDiT take packed tokens with one length per sample")
        by_length: dict[int, list[int]] = {}
        for sample, length in enumerate(ragged.lengths):
            by_length.setdefault(length, []).append(sample)
        calls = []
        for length, samples in by_length.items():
            index = torch.tensor(samples, device=x.device)
            starts = ragged.ptr.index_select(0, index)
            rows = starts[:, None] + torch.arange(length, device=x.device)
            tokens = x.index_select(0, rows.flatten())
            call = self.make_call(
                rearrange(tokens, "(b m) d -> b m d", m=length),
                condition.index_select(0, index),
                numbers,
                None if len(by_length) == 1 else Part(index, b),
                rows.flatten(),
            )
            calls.append(call)
        return calls[0] if len(calls) == 1 else tuple(calls)

    def make_call(
        self,
        x: Tensor,
        condition: Tensor,
        numbers: HostNumbers,
        part: Part | None,
        rows: Tensor | None = None,
    ) -> BlockCall:
        """Return the call of samples that keep as many tokens.

        Args:
            x: their tokens, `(b m d)`.
            condition: of each sample, `(b c)`.
            numbers: what was handed over.
            part: which samples of the batch these are.
            rows: where the tokens stand in the packed run; None in the fixed layout.
        """
        steps = numbers.timestep
        if steps is not None:
            steps = steps.expand(part.batch if part else x.shape[0])
            steps = steps if part is None else steps.index_select(0, part.samples)
        return BlockCall(
            x,
            (x.shape[1],),
            condition=condition,
            timestep=steps,
            part=part,
            shared={"rows": rows},
            standing=find_standing(x, numbers, rows, part),
        )

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block on dense tokens (see `Backbone.run`)."""
        return call.with_x(block(call.x, call.condition, None))

    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return the tokens as the model runs them (see `Backbone.write`)."""
        if call.shared["rows"] is None:
            return call.x
        return rearrange(call.x, "b m d -> (b m) d")

    def write_groups(self, calls: tuple[BlockCall, ...]) -> Any:  # noqa: ANN401
        """Return the tokens of all groups in one run (see `Backbone.write_groups`)."""
        rows = []
        for call in calls:
            places = call.shared["rows"]
            assert isinstance(places, Tensor)
            rows.append(places)
        back = torch.cat(rows).argsort()
        return torch.cat([self.write(call) for call in calls]).index_select(0, back)

    def example(self, model: nn.Module) -> HostInputs:
        """Return two latents with times and classes, of which half the cells are kept."""
        assert isinstance(model, DCDiT)
        config, device = model.config, device_of(model)
        h, w = config.grid
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, config.in_channels, h, w, generator=generator)
        return HostInputs(
            (
                latents.to(device, dtype_of(model)),
                torch.tensor([200.0, 700.0], device=device),
                torch.zeros(2, dtype=torch.long, device=device),
            ),
            {"keep": 0.5},
        )


def find_standing(
    x: Tensor, numbers: HostNumbers, rows: Tensor | None, part: Part | None
) -> Standing | None:
    """Return which cells the tokens of a call are.

    Args:
        x: the tokens, `(b m d)`.
        numbers: what was handed over.
        rows: where the tokens stand in the packed run; None in the fixed layout.
        part: which samples of the batch these are.

    Returns:
        Their places; None if the blocks were called by themselves.
    """
    cells = numbers.cells
    if cells is None:
        return None
    if rows is not None:
        cells = cells.index_select(0, rows).view(x.shape[:2])
    routing = numbers.routing
    if routing is not None and part is not None:
        routing = routing.select(part.samples)
    return Standing(cells, numbers.cell_grid, find_nearest, routing)
