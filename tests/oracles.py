"""Slow and obvious forms of what the library does fast."""

import itertools

import torch


def cells_of(grid):
    """Coordinates of all cells in flat order, float64, `(n axes)`."""
    return torch.tensor(list(itertools.product(*map(range, grid))), dtype=torch.float64)


def nearest_all_pairs(keep_mask, grid):
    """Nearest kept cell by comparing all pairs; a tie goes to the lower index."""
    u = cells_of(grid)
    out = []
    for mask in keep_mask:
        kept = mask.nonzero().squeeze(1)
        distance = (u[:, None] - u[kept][None]).square().sum(-1)
        out.append(
            kept[[min(range(len(kept)), key=lambda j: (row[j].item(), j)) for row in distance]]
        )
    return torch.stack(out)


def smooth_all_pairs(h, prob, cells, grid, sigma):
    """Smoothing of one sample's kept tokens with the whole weight matrix, in float64."""
    u = cells_of(grid)[cells]
    p = prob.double().clamp(1e-4, 1 - 1e-4)
    weights = torch.exp(-(u[:, None] - u[None]).square().sum(-1) / (2 * sigma**2)) * p[None]
    weights = weights / (weights.sum(1, keepdim=True) + 1e-8)
    return p[:, None] * h.double() + (1 - p)[:, None] * (weights @ h.double())


def keep_loop(prob, natural, *, keep=None, tokens=None, drop=None):
    """The kept cells of one sample under a budget, cell by cell."""
    n = len(prob)
    ranked = sorted(range(n), key=lambda i: (-prob[i].item(), i))
    if keep is not None:
        return set(ranked[: max(1, int(keep * n + 0.5))])
    if tokens is not None:
        return set(ranked[:tokens])
    kept = [i for i in ranked if natural[i]]
    count = len(kept) - int((torch.tensor(drop or 0.0) * len(kept)).floor())
    return set((kept or ranked)[: max(1, count)])
