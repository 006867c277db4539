"""The methods of the tables, each with its budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import adaptok

KEEPS = (0.9, 0.7, 0.5, 0.3)


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of a table.

    Args:
        name: what the table calls it.
        budget: keyword arguments of `adaptok.set_budget`; empty is the method's own.
        options: keyword arguments of `adaptok.wrap`.
        seeds: passes with other random numbers.
    """

    name: str
    budget: Mapping[str, float]
    options: Mapping[str, Any]
    seeds: tuple[int, ...] = (0,)

    @property
    def label(self) -> str:
        """The name with its budget."""
        shown = " ".join(f"{key}={value:g}" for key, value in self.budget.items())
        return f"{self.name} {shown}".strip()


@dataclass(frozen=True, slots=True)
class Method:
    """A method and how it is asked for.

    Args:
        name: what the table calls it.
        options: keyword arguments of `adaptok.wrap`.
        seeds: passes with other random numbers.
        note: what a reader must know.
    """

    name: str
    options: Mapping[str, Any]
    seeds: tuple[int, ...] = (0,)
    note: str = ""
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def list_settings(self) -> list[Setting]:
        """Return its lines."""
        own = [Setting(name, {}, options, self.seeds) for name, options in self.extra.items()]
        kept = [Setting(self.name, {"keep": keep}, self.options, self.seeds) for keep in KEEPS]
        return [*kept, *own]


class RandomDrop(adaptok.ReduceStage):
    """Drops random tokens, `r` in front of each block: the floor of every method that merges so.

    Args:
        r: tokens dropped in front of each block.
    """

    drops = True

    def __init__(self, r: int = 8) -> None:
        super().__init__("random-drop")
        self.r = r

    def find_sites(self, inner: adaptok.BlockRange) -> Sequence[adaptok.Site]:
        """Return a site in front of each block."""
        return [adaptok.Site(block) for block in range(inner.first, inner.last)]

    def count_naturally(self, n: int, steps: int) -> int:
        """Return what is left (see `ReduceStage.count_naturally`)."""
        for _ in range(steps):
            n -= min(self.r, n // 2)
        return n

    def reduce(self, moment: adaptok.Moment) -> adaptok.Reduction:
        """Keep random tokens."""
        b, m = moment.sizes.shape
        left = moment.count if moment.count is not None else m - min(self.r, m // 2)
        places = torch.rand(b, m).argsort(1)[:, :left].sort(1).values
        owner = torch.full((b, m), -1)
        return adaptok.Reduction(
            places, owner.scatter(1, places, torch.arange(left).expand(b, left))
        )


def random_drop(r: int) -> dict[str, Any]:
    """Return how random dropping is asked for."""
    return {"stack": [RandomDrop(r)]}


METHODS = (
    Method("random", {"chunker": "dc", "router": "random"}, note="the floor"),
    Method("dc", {"chunker": "dc"}),
    Method("hnet", {"chunker": "hnet"}),
    Method("apt", {"chunker": "apt"}),
    Method("graph", {"chunker": "graph"}),
    Method(
        "tome",
        {"stack": ["tome"]},
        extra={f"tome r={r}": {"stack": [{"name": "tome", "r": r}]} for r in (8, 13)},
    ),
    Method(
        "random-drop",
        {"stack": [RandomDrop()]},
        extra={f"random-drop r={r}": random_drop(r) for r in (8, 13)},
        note="drops as many tokens at each block as tome merges",
    ),
    Method("tomesd", {"stack": ["tomesd"]}, note="gives all tokens back after each block"),
    Method("evit", {"stack": ["evit"]}),
    Method("dynamicvit", {"stack": ["dynamicvit"]}, note="its predictor is not trained here"),
)
