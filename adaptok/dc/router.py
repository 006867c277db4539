"""The router of DC-DiT: a cell deserves a token where its neighbours do not predict it."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.dc.config import DCDiTConfig
from adaptok.errors import ConfigError, ShapeError
from adaptok.float32 import Float32Module, without_autocast
from adaptok.parts import HostFacts, build_part
from adaptok.routing import Context, Router, Routing
from adaptok.tokens import Tokens

ROUTER_BIAS = -1.1  # sigmoid(-1.1) = 0.25: about one cell in four at the start
SCORE_GROUPS = 8


class DCRouter(Float32Module, Router):
    """Predicts each cell from its surroundings and scores what the prediction misses.

    Runs in float32 always. The first and the last cell of a grid always get probability 1.

    Args:
        width: features of a token, a multiple of 32.
        bias: bias of the logit at the start.

    Raises:
        ConfigError: the width is not a multiple of 32.

    Example:
        >>> router = DCRouter(64)
        >>> routing = router(Tokens(torch.randn(2, 12, 64), grid=(3, 4)), Context())
        >>> routing.keep_prob.shape, routing.keep_prob[0, 0].item()
        (torch.Size([2, 12]), 1.0)

    Paper: DC-DiT, arXiv 2603.06351.
    """

    def __init__(self, width: int, bias: float = ROUTER_BIAS) -> None:
        super().__init__()
        if width % (4 * SCORE_GROUPS):
            raise ConfigError(f"the router needs a width that is a multiple of 32, got {width}")
        inner = width // 4
        self.project = nn.Conv2d(width, inner, 1)
        self.predict = nn.Conv2d(inner, inner, 3, padding=1)
        self.score = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.GroupNorm(SCORE_GROUPS, inner),
            nn.SiLU(),
            nn.Conv2d(inner, 1, 1),
        )
        nn.init.constant_(self.logit_bias, bias)

    @property
    def logit_bias(self) -> Tensor:
        """The bias of the keep logit."""
        bias = self.score[3].bias
        assert isinstance(bias, Tensor)
        return bias

    def forward(self, tokens: Tokens, context: Context) -> Routing:
        """Judge the cells of a two-dimensional grid (see `Router.forward`)."""
        if tokens.grid is None or len(tokens.grid) != 2:
            raise ShapeError(f"this router needs a grid (h, w), got {tokens.grid}")
        if tokens.valid is not None or tokens.is_packed:
            raise ShapeError("this router needs one token per grid cell, without padding")
        self.check_float32()
        with without_autocast(tokens.x):
            return Routing(self.keep_prob(tokens.x.float(), tokens.grid))

    def keep_prob(self, x: Float[Tensor, "b n d"], grid: tuple[int, ...]) -> Float[Tensor, "b n"]:
        """Return the keep probability of each cell."""
        h, w = grid
        z = self.project(rearrange(x, "b (h w) d -> b d h w", h=h, w=w))
        logit = self.score(z - self.predict(z))
        prob: Tensor = rearrange(logit.sigmoid(), "b 1 h w -> b (h w)")
        index = torch.arange(h * w, device=x.device)
        return prob.masked_fill((index == 0) | (index == h * w - 1), 1.0)


def make_router(config: DCDiTConfig) -> Router:
    """Return the router of a reference model: DC-DiT's own, or a registered one.

    Args:
        config: options of the model.

    Returns:
        The router, for tokens as wide as the model's blocks.

    Raises:
        UnknownNameError: no router has that name.
        ConfigError: its options are wrong.

    Example:
        >>> make_router(DCDiTConfig(hidden_size=64, num_heads=2, router="cosine"))
        CosineRouter(centre=True, falloff=2)
    """
    if config.router is None:
        return DCRouter(config.hidden_size)
    facts = HostFacts(width=config.hidden_size, depth=config.depth, grid_axes=2)
    made, _ = build_part("router", config.router, facts)
    assert isinstance(made, Router)
    return made
