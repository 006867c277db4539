"""Which model a profile belongs to."""

import hashlib

from torch import nn

from adaptok.adapters import MARK, HostMark, mark_host
from adaptok.blocks import AdaptiveBlocks


class ProfileMark(HostMark):
    """Which model a profile belongs to.

    Args:
        model: see `HostMark`, as for all but the last one.
        backbone: name of the adapter of its family.
        width: features of a token.
        depth: number of blocks.
        span: the first block inside the stages, and the one behind the last.
        shapes: fingerprint of names and shapes of the host's own weights; position codes made for
            another grid change it, another training does not.

    Raises:
        ConfigError: a value is missing or wrong.
    """

    shapes: str

    def describe(self) -> str:
        """Say it in words."""
        return f"{super().describe()}, weights of the shapes {self.shapes}"


def mark_profile(model: nn.Module, blocks: AdaptiveBlocks) -> ProfileMark:
    """Return which model this is."""
    host = mark_host(model, blocks.backbone, blocks.span)
    own = {name: value for name, value in model.state_dict().items() if MARK not in name}
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in own.items())
    shapes = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return ProfileMark(**host.model_dump(), shapes=shapes)
