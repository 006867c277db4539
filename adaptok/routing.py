"""Routing: what a router says about each cell, and the router's interface."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from adaptok.errors import DtypeError, RoutingError, ShapeError
from adaptok.tokens import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The keep probability of each cell, and the decisions that follow from it.

    Args:
        keep_prob: keep probability of each cell, in [0, 1], `(b n)`. Checked on a CPU only,
            since a GPU would have to be waited for.
        keep_mask: the cells that are kept after the budget, `(b n)`; None until a budget has
            been applied.
        natural_mask: the cells that the router keeps of itself, before any budget, `(b n)`;
            None means `keep_prob > threshold`.
        threshold: a cell is kept where its probability is above this number (a tie is not
            kept); None says that the router only ranks cells, so that it needs a budget.

    Raises:
        ShapeError: the parts do not fit each other.
        RoutingError: a probability is outside [0, 1].
        DtypeError: the probabilities are no floating-point numbers or the masks no booleans.

    Example:
        >>> routing = Routing(torch.tensor([[0.9, 0.5, 0.2]]))
        >>> routing.natural_mask
        tensor([[ True, False, False]])
    """

    keep_prob: Float[Tensor, "b n"]
    keep_mask: Bool[Tensor, "b n"] | None = None
    natural_mask: Bool[Tensor, "b n"] | None = None
    threshold: float | None = 0.5

    def __post_init__(self) -> None:
        shape = tuple(self.keep_prob.shape)
        if len(shape) != 2 or shape[1] < 1:
            raise ShapeError(f"keep_prob needs the shape (b, n) with n >= 1, got {shape}")
        if not self.keep_prob.is_floating_point():
            raise DtypeError(f"keep_prob needs floating-point numbers, got {self.keep_prob.dtype}")
        if self.keep_prob.device.type == "cpu" and not torch.compiler.is_compiling():
            check_probabilities(self.keep_prob)
        for name in ("keep_mask", "natural_mask"):
            mask = getattr(self, name)
            if mask is None:
                continue
            if tuple(mask.shape) != shape:
                raise ShapeError(f"{name} needs the shape {shape}, got {tuple(mask.shape)}")
            if mask.dtype != torch.bool:
                raise DtypeError(f"{name} needs booleans, got {mask.dtype}")
        if self.natural_mask is None and self.threshold is not None:
            object.__setattr__(self, "natural_mask", self.keep_prob > self.threshold)

    @property
    def kept(self) -> Int[Tensor, " b"]:
        """How many cells each sample keeps after the budget."""
        if self.keep_mask is None:
            raise ShapeError(
                "this routing has no keep_mask yet: call apply_budget(routing, budget) first"
            )
        return self.keep_mask.sum(1)

    def with_keep_mask(self, keep_mask: Bool[Tensor, "b n"]) -> "Routing":
        """Return the same routing with the decision of a budget in it."""
        return replace(self, keep_mask=keep_mask)

    def select(self, samples: Int[Tensor, " s"]) -> "Routing":
        """Return the routing of some samples.

        Args:
            samples: which samples of the batch.
        """
        keep, natural = (
            None if mask is None else mask.index_select(0, samples)
            for mask in (self.keep_mask, self.natural_mask)
        )
        return replace(
            self,
            keep_prob=self.keep_prob.index_select(0, samples),
            keep_mask=keep,
            natural_mask=natural,
        )


def check_probabilities(prob: Float[Tensor, "b n"]) -> None:
    """Raise a `RoutingError` if values lie outside [0, 1].

    What is not a number passes: trainer and sampler look for it, and can say in which step.
    """
    low, high = (float(value) for value in prob.detach().aminmax())
    if low < 0.0 or high > 1.0:
        raise RoutingError(
            f"keep_prob needs probabilities in [0, 1], got values from {low:g} to {high:g}: pass "
            "logits through a sigmoid"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What a router may know beside the tokens.

    Args:
        condition: conditioning vector of each sample, `(b d)`.
        timestep: diffusion time of each sample as the model takes it, `(b)`.
        branch: guidance branch, such as `"cond"` or `"uncond"`.
        request: name of the request that this call belongs to.

    Example:
        >>> Context(timestep=torch.tensor([999.0])).branch is None
        True
    """

    condition: Float[Tensor, "b d"] | None = None
    timestep: Float[Tensor, " b"] | Int[Tensor, " b"] | None = None
    branch: str | None = None
    request: str | None = None


class Router(nn.Module, ABC):
    """Says how much each cell deserves a token of its own.

    A subclass implements `forward`. `Routing(keep_prob)` is enough as an answer: masks follow
    from the budget.

    Example:
        >>> class NormRouter(Router):
        ...     def forward(self, tokens, context):
        ...         norm = tokens.x.norm(dim=-1)
        ...         return Routing(norm / norm.amax(dim=1, keepdim=True), threshold=None)
        >>> routing = NormRouter()(Tokens(torch.ones(1, 4, 8), grid=(2, 2)), Context())
        >>> routing.keep_prob.shape
        torch.Size([1, 4])
    """

    # Whether a fresh one keeps every cell of itself, so that a new wrap changes nothing.
    starts_full: ClassVar[bool] = False

    @abstractmethod
    def forward(self, tokens: Tokens, context: Context) -> Routing:
        """Judge the cells.

        Args:
            tokens: dense tokens, one per grid cell.
            context: condition, timestep, branch and request of this call.

        Returns:
            The routing; its `keep_mask` may stay None.
        """
