"""The work of `adaptok doctor`: a model that chooses its tokens itself is looked at otherwise."""

import torch
from torch import nn

from adaptok.dc.model import DCDiT
from adaptok.discovery import HOST
from adaptok.doctoring import Fit, Report, doctor, try_options
from adaptok.probing import undisturbed
from adaptok.wrapping import resolve_backbone

OWN = (
    "stages around its blocks; it has a router and a chunker of its own, so that nothing needs to "
    "be wrapped to save tokens: budgets are for those (`adaptok sample --drop 0.3`), and `adaptok "
    "bench` measures them"
)


def examine(model: nn.Module, repeats: int) -> Report:
    """Look at a model (see `adaptok.doctor`).

    Args:
        model: the model.
        repeats: turns of the measurement.

    Returns:
        The report; that of a `DCDiT` is of stages only, since no chunker fits behind its own.

    Example:
        >>> import adaptok
        >>> config = adaptok.DCDiTConfig(hidden_size=64, depth=2, num_heads=2, latent_size=8)
        >>> report = examine(adaptok.DCDiT(config), repeats=1)
        >>> report.ok, "tome" in [fit.name for fit in report.fits if not fit.reason]
        (True, True)
    """
    if not isinstance(model, DCDiT):
        return doctor(model, repeats=repeats)
    host = resolve_backbone(model, "auto")
    HOST.load_all()
    with undisturbed(model), torch.no_grad():
        fits = tuple(
            Fit("stage", name, try_options(model, host, {"stack": [name]}))
            for name in HOST.registry.names("stage")
        )
    return Report(
        f"{type(model).__module__}.{type(model).__qualname__}",
        backbone=host.name,
        family=host.family,
        versions=host.versions,
        note=OWN,
        blocks=host.depth,
        width=host.width,
        containers=host.containers,
        together=host.positions_per_sample,
        branches=host.branches,
        fits=fits,
    )
