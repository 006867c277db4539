"""How a check runs a host of somebody else: wrapped, watched, shuffled, sample by sample."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.budgets import Budget
from adaptok.calls import BlockCall
from adaptok.chunk_stage import ChunkStage
from adaptok.dc.host import HostChunker
from adaptok.discovery import find_part
from adaptok.hosts import Backbone, HostInputs
from adaptok.routers import PredictabilityRouter
from adaptok.stages import BlockRange, Effects, Stage
from adaptok.testing.models import fill_weights
from adaptok.testing.partners import OwnFeatures
from adaptok.testing.report import require
from adaptok.wrapping import resolve_backbone, wrap

ModelSpec = nn.Module | Callable[[], nn.Module]
InputSpec = HostInputs | Callable[[nn.Module], HostInputs | None] | None
Change = Callable[[Tensor], Tensor]


class Watch(Stage):
    """Notes the calls that come by, and changes nothing.

    Args:
        calls: where they are noted.
    """

    effects: ClassVar[Effects] = Effects("width", compilable=True)

    def __init__(self, calls: list[BlockCall]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Note the call (see `Stage.forward`)."""
        self.calls.append(call)
        return inner(call)


class Shuffle(Stage):
    """Runs the blocks on the cells in another order, and puts them back: nothing may change."""

    effects: ClassVar[Effects] = Effects("tokens")

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run the blocks on shuffled cells (see `Stage.forward`)."""
        b, n = call.x.shape[0], call.num_cells
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(call.x.device)
        after = inner(call.take(order.expand(b, n)))
        return call.put(after.cell_x[:, order.argsort()], after.rest_x, after.streams)


class BackboneCase:
    """A backbone that is checked, with a host.

    Args:
        backbone: a name, a class, or an instance.
        model: a function that makes the host, always alike, or a host, of which copies are used.
        inputs: what the host is called with; None takes the backbone's own example.
        refused: calls of the wrapped host that must be refused, by what they ask for.
    """

    def __init__(
        self,
        backbone: str | Backbone | type[Backbone],
        model: ModelSpec,
        inputs: InputSpec = None,
        refused: Mapping[str, Callable[[nn.Module], object]] | None = None,
    ) -> None:
        self.backbone = backbone
        self.model = model
        self.given = inputs
        self.reader: Backbone | None = None
        self.refused = dict(refused or {})
        if isinstance(backbone, str) and backbone != "auto":
            find_part("backbone", backbone)  # an unknown name is one error, not one for each check
        name = backbone if isinstance(backbone, str) else backbone.name
        self.title = f"backbone {name!r} of {type(self.make_model()).__name__}"

    def make_model(self) -> nn.Module:
        """Return the host with weights that all matter, in eval mode."""
        made = copy.deepcopy(self.model) if isinstance(self.model, nn.Module) else self.model()
        return fill_weights(made).eval()

    def resolve(self, model: nn.Module) -> Backbone:
        """Return the adapter of a host."""
        if isinstance(self.backbone, type):
            return self.backbone.match(model)
        return resolve_backbone(model, self.backbone)

    def inputs(self, model: nn.Module) -> HostInputs:
        """Return what a host is called with."""
        given = self.given
        if given is not None and not isinstance(given, HostInputs):
            given = given(model)
        return self.resolve(model).example(model) if given is None else given

    def attach(
        self, model: nn.Module, budget: Budget | None = None, *stages: Stage, verify: bool = False
    ) -> nn.Module:
        """Wrap a host, with a stage without weights that keeps a budget if there is one."""
        stack = list(stages)
        if budget is not None:
            stack.insert(0, ChunkStage(PredictabilityRouter(), HostChunker(), OwnFeatures(), "dc"))
        host = self.resolve(model)
        return wrap(model, stack=stack, budget=budget, backbone=host, verify=verify)

    def run(self, model: Callable[..., Any], inputs: HostInputs) -> Tensor:
        """Return the tensor of a host's output that is compared."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return self.read_output(model(*inputs.args, **inputs.kwargs))

    def read_output(self, output: object) -> Tensor:
        """Return the tensor of an output that is compared."""
        if self.reader is None:
            self.reader = self.resolve(self.make_model())
        return self.reader.output(output)

    def watch(self, inputs: HostInputs | None = None, budget: Budget | None = None) -> BlockCall:
        """Return the call that the first block of a host gets."""
        model, calls = self.make_model(), list[BlockCall]()
        inputs = inputs or self.inputs(model)
        self.run(self.attach(model, budget, Watch(calls)), inputs)
        require(len(calls) == 1, f"one call of the host entered its blocks {len(calls)} times")
        return calls[0]


def map_tensors(value: Any, change: Change, path: str = "") -> Any:  # noqa: ANN401
    """Return nested arguments with each tensor changed."""
    return map_named(value, lambda _, x: change(x), path)


def map_named(value: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:  # noqa: ANN401
    """Return nested arguments with each tensor changed, which is told its place."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, HostInputs):
        kwargs = {k: map_named(v, change, f"{path}/{k}") for k, v in value.kwargs.items()}
        return HostInputs(map_named(value.args, change, path), kwargs)
    if isinstance(value, dict):
        return {key: map_named(item, change, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_named(item, change, f"{path}/{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def float_groups(inputs: HostInputs) -> list[dict[str, Tensor]]:
    """Return the floating-point tensors among arguments by place; those of one list together."""
    groups: dict[str, dict[str, Tensor]] = {}

    def note(path: str, x: Tensor) -> Tensor:
        if x.is_floating_point():
            nested = path.count("/") > 1
            groups.setdefault(path.rpartition("/")[0] if nested else path, {})[path] = x
        return x

    map_named(inputs, note)
    return list(groups.values())


def replace_tensors(inputs: HostInputs, values: Mapping[str, Tensor]) -> HostInputs:
    """Return arguments with other tensors at some places."""
    changed = map_named(inputs, lambda path, x: values.get(path, x))
    assert isinstance(changed, HostInputs)
    return changed


def pick_sample(value: Any, sample: int, b: int) -> Any:  # noqa: ANN401
    """Return nested arguments of one sample: of tensors and lists with one item per sample."""
    if isinstance(value, Tensor):
        return value[sample : sample + 1] if value.ndim and value.shape[0] == b else value
    if isinstance(value, HostInputs):
        kwargs = {key: pick_sample(item, sample, b) for key, item in value.kwargs.items()}
        return HostInputs(pick_sample(value.args, sample, b), kwargs)
    if isinstance(value, dict):
        return {key: pick_sample(item, sample, b) for key, item in value.items()}
    if isinstance(value, list) and len(value) == b:
        return value[sample : sample + 1]
    if isinstance(value, tuple):
        return tuple(pick_sample(item, sample, b) for item in value)
    return value


def measure_change(
    case: BackboneCase, before: BlockCall, inputs: HostInputs
) -> Float[Tensor, " s"]:
    """Return how much other arguments change each row of the sequence, over the samples."""
    x = case.watch(inputs).x
    if x.shape != before.x.shape:
        return torch.zeros(before.x.shape[1])
    change: Tensor = (x - before.x).abs().amax((0, 2)) / before.x.abs().max()
    return change


def find_image(case: BackboneCase, before: BlockCall) -> list[tuple[str, Tensor]] | None:
    """Return the argument that changes exactly the cells of the grid, and its place.

    A list of tensors, one per sample, is one argument.
    """
    inputs = case.inputs(case.make_model())
    cells = torch.zeros(before.x.shape[1], dtype=torch.bool)
    cells[before.start : before.start + before.num_cells] = True
    generator = torch.Generator().manual_seed(0)
    for group in float_groups(inputs):
        noise = {p: x + torch.randn(x.shape, generator=generator).to(x) for p, x in group.items()}
        change = measure_change(case, before, replace_tensors(inputs, noise))
        if torch.equal(change.cpu() > 1e-6, cells):
            return list(group.items())
    return None


def listen(blocks: Sequence[nn.Module], note: Callable[[Tensor], None]) -> None:
    """Tell a function the first argument of each innermost module of some blocks, for good.

    Blocks themselves may not be listened to: some are run submodule by submodule, and others
    checkpoint what is behind their hooks.
    """

    def tell(module: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            note(args[0])

    for block in blocks:
        for module in block.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(tell)
