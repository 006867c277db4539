"""Checks of every kind of part: what a module of a batch of samples must do."""

import copy
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from adaptok.budgets import Budget
from adaptok.discovery import name_of_part
from adaptok.parts import PartConfig, build_part, describe_instance, options_of
from adaptok.stages import Stage
from adaptok.testing.cases import (
    GRID,
    ODD_GRIDS,
    ROUNDING,
    Answer,
    PartCase,
    copy_part,
    is_same,
    make_tokens,
    require_close,
    require_finite,
    take_sample,
)
from adaptok.testing.models import fill_weights
from adaptok.testing.report import ConformanceError, NotRun, require
from adaptok.tokens import Tokens

VARIES = {
    "state": "two calls with the same tokens and the same torch.manual_seed differ, and the first "
    "call of a copy is as the first one: it keeps something from call to call. Let the answer "
    "depend on its input alone",
    "elsewhere": "two copies, each called once with the same tokens and the same "
    "torch.manual_seed, differ: it draws numbers that torch.manual_seed does not reach (random, "
    "numpy, a generator without a seed). Draw them from torch",
    "unknown": "two calls with the same tokens and the same torch.manual_seed differ, and it "
    "cannot be copied to see why: it keeps something from call to call, or draws numbers that "
    "torch.manual_seed does not reach",
}


def require_shapes(answer: Answer, tokens: Tokens, what: str) -> None:
    """Raise a `ConformanceError` unless an answer is finite, with one row per sample and cell."""
    b, n = tokens.x.shape[:2]
    shape = tuple(answer[0].shape)
    require(
        all(x.shape[0] == b for x in answer) and shape[1] >= n,
        f"{what}: the answer has the shape {shape} for {b} samples of {n} cells",
    )
    require_finite(answer, f"{what}: the answer holds what is no finite number")


def check_odd_grids(case: PartCase) -> None:
    """Grids of one row, one column, one cell, odd lengths and many cells work."""
    part = case.make_filled()
    for grid in ODD_GRIDS:
        tokens = make_tokens(grid, width=case.width)
        try:
            answer = case.answer_seeded(part, tokens)
        except Exception as error:  # the message of others seldom says on which grid
            said = f"{type(error).__name__}: {error}"
            raise ConformanceError(f"on a grid {grid} it fails: {said:.200}") from error
        require_shapes(answer, tokens, f"on a grid {grid}")


def check_constant(case: PartCase) -> None:
    """Cells that are all alike, and features of zeros, give finite answers."""
    part = case.make_filled()
    for value in (0.0, 0.7):
        tokens = make_tokens(width=case.width)
        tokens = tokens.with_x(torch.full_like(tokens.x, value))
        require_shapes(case.answer_seeded(part, tokens), tokens, f"where all features are {value}")


def check_inputs(case: PartCase) -> None:
    """The tokens that came are left as they are."""
    part = case.make_filled()
    tokens = make_tokens(width=case.width)
    before = tokens.x.clone()
    case.answer_seeded(part, tokens)
    require(torch.equal(tokens.x, before), "the features that it was given changed: work on a copy")


def check_batch(case: PartCase) -> None:
    """A sample's answer is the same alone and beside others."""
    variation = case.find_variation()
    if variation == "seeded":
        raise NotRun("it draws new random numbers in each call")
    if variation in ("elsewhere", "unknown"):
        raise NotRun("two calls with the same tokens differ: the check `seed` says why")
    part = case.make_filled()
    tokens = make_tokens(width=case.width)
    # copies, so that what it keeps from call to call is not taken for its batch mates
    together = case.answer_seeded(copy_part(part), tokens)
    require_finite(together, "the answer holds what is no finite number")
    for sample in range(tokens.num_samples):
        alone = case.answer_seeded(copy_part(part), take_sample(tokens, sample))
        beside = tuple(x[sample : sample + 1] for x in together)
        problem = f"sample {sample} has another answer beside others than alone"
        require_close(beside, alone, ROUNDING, problem)


def check_seed(case: PartCase) -> None:
    """The same seed gives the same answer, and nobody is reseeded."""
    variation = case.find_variation()
    require(variation not in VARIES, VARIES.get(variation, ""))
    part = case.make_filled()
    tokens = make_tokens(width=case.width)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        states = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            case.answer(part, tokens)
            states.append(torch.get_rng_state())
    require(
        not torch.equal(*states),
        "torch's default generator is in the same state behind it, whatever seed it had before: "
        "use a torch.Generator of its own in the place of torch.manual_seed",
    )


def check_half(case: PartCase) -> None:
    """It runs in bfloat16, with tokens of bfloat16."""
    part = case.make_filled().to(torch.bfloat16)
    tokens = make_tokens(width=case.width, dtype=torch.bfloat16)
    require_shapes(case.answer_seeded(part, tokens), tokens, "in bfloat16")


def check_autocast(case: PartCase) -> None:
    """It runs under autocast."""
    part = case.make_filled()
    tokens = make_tokens(width=case.width)
    with torch.autocast("cpu", torch.bfloat16):
        require_shapes(case.answer_seeded(part, tokens), tokens, "under autocast")


def check_deepcopy(case: PartCase) -> None:
    """A deep copy answers alike, and uses its own weights."""
    part = case.make_filled()
    tokens = make_tokens(width=case.width)
    expected = case.answer_seeded(part, tokens)
    twin = copy.deepcopy(part)
    require(is_same(case.answer_seeded(twin, tokens), expected), "the copy answers otherwise")
    if not list(part.parameters()):
        return
    fill_weights(twin, seed=1)
    require(
        is_same(case.answer_seeded(part, tokens), expected),
        "new weights of the copy changed the original: they share weights",
    )
    require(
        not is_same(case.answer_seeded(twin, tokens), expected),
        "new weights of the copy did not change what it answers: it uses the original's",
    )


def check_pickle(case: PartCase) -> None:
    """It survives pickle, as a process that loads data or trains beside others needs."""
    part = case.make_filled()
    tokens = make_tokens(width=case.width)
    expected = case.answer_seeded(part, tokens)
    again = pickle.loads(pickle.dumps(part))
    require(is_same(case.answer_seeded(again, tokens), expected), "it answers otherwise afterwards")


def check_state_dict(case: PartCase) -> None:
    """Its state dict holds tensors only, and all that makes its answer."""
    part, other = case.make_filled(seed=0), case.make_filled(seed=1)
    tokens = make_tokens(width=case.width)
    state = part.state_dict()
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    require(not wrong, f"{', '.join(wrong)} of its state dict are no tensors")
    other.load_state_dict(state)
    require(
        is_same(case.answer_seeded(other, tokens), case.answer_seeded(part, tokens)),
        "another one with the same state dict answers otherwise: register what belongs to it as "
        "a parameter or a buffer",
    )


def check_stateless(case: PartCase) -> None:
    """No tensor of a forward pass stays on it."""
    part = case.make_filled()
    if isinstance(part, Stage) and part.effects.keeps_state:
        raise NotRun("its effects declare keeps_state")
    before = [x for _, x in find_tensors(part)]  # held, so that no new tensor takes an old id
    known = {id(x) for x in before}
    case.answer(part, make_tokens(width=case.width))
    left = sorted({name for name, x in find_tensors(part) if id(x) not in known})
    require(not left, f"tensors of a forward pass stay in {', '.join(left)}: return them instead")


def find_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors that the modules of a part hold, with the attribute that holds them."""
    for path, module in part.named_modules():
        for name, value in vars(module).items():
            where = ".".join(filter(None, (path, name)))
            if name != "_modules":
                yield from ((where, x) for x in tensors_in(value))


def tensors_in(value: object, depth: int = 8) -> Iterator[Tensor]:
    """Give the tensors in nested containers and dataclasses; budgets are settings."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or isinstance(value, Budget | nn.Module):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name, None), depth - 1)


def check_compile(case: PartCase) -> None:
    """It becomes one graph by torch.compile(fullgraph=True) and answers the same."""
    part = case.make_filled()
    allowed = part.effects.compilable if isinstance(part, Stage) else None
    if not getattr(part, "compilable", True if allowed is None else allowed):
        raise NotRun("compilable = False")
    tokens = make_tokens(width=case.width)
    expected = case.answer_seeded(part, tokens)

    def run(x: Tensor) -> Answer:
        return case.answer(part, Tokens(x, GRID))

    torch.compiler.reset()
    try:
        graph = torch.compile(run, fullgraph=True, backend="eager")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            found = graph(tokens.x)
    finally:
        torch.compiler.reset()
    require_close(found, expected, ROUNDING, "the graph answers otherwise")


def check_options(case: PartCase) -> None:
    """Its options can be read off it, and make the same part again."""
    part = case.make()
    if name_of_part(case.kind, type(part)) is None:
        raise NotRun("its class has no registered name")
    missing = [name for name in options_of(type(part)).model_fields if not hasattr(part, name)]
    require(
        not missing,
        f"it keeps {', '.join(missing)} to itself: an option is an attribute of the same name",
    )
    described = describe_instance(case.kind, part)
    require(described is not None, "its options do not go into a configuration of plain values")
    assert described is not None
    if case.config is not None:
        for name, value in case.config.options.items():
            require(
                getattr(part, name) == value,
                f"it was made with {name}={value!r} and says {getattr(part, name)!r}",
            )
    written = PartConfig.from_json(described.to_json())
    again, _ = build_part(case.kind, written, case.facts)
    require(
        describe_instance(case.kind, again) == described,
        f"the part made from {written.options} has other options than the one before",
    )


MODULE_CHECKS = (
    check_odd_grids,
    check_constant,
    check_inputs,
    check_batch,
    check_seed,
    check_half,
    check_autocast,
    check_deepcopy,
    check_pickle,
    check_state_dict,
    check_stateless,
    check_compile,
    check_options,
)
