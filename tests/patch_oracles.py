"""Quadtrees and merge orders by loops, to hold those of adaptok_patch against."""

import math


def histogram_entropy(values, bins, peak):
    counts = {}
    for value in values:
        place = min(int(value / peak * bins), bins - 1)
        counts[place] = counts.get(place, 0) + 1
    n = len(values)
    return -sum(c / n * math.log2(c / n) for c in counts.values())


def grow_tree(maps, thresholds, h, w):
    """Return the patches (y, x, edge) of one sample: `maps` holds nested lists by scale."""
    scales = sorted(maps)
    limits = dict(zip(scales, thresholds, strict=True))
    patches = []

    def visit(y, x, edge):
        if y >= h or x >= w:
            return
        fits = y + edge <= h and x + edge <= w
        low = edge in maps and fits and maps[edge][y // edge][x // edge] < limits[edge]
        if edge == 1 or low:
            patches.append((y, x, edge))
            return
        half = edge // 2
        for down in (0, half):
            for aside in (0, half):
                visit(y + down, x + aside, half)

    top = scales[-1]
    for y in range(0, h, top):
        for x in range(0, w, top):
            visit(y, x, top)
    return patches


def mark_cells(patches, h, w):
    """Return the edge of the patch of each cell; a cell in two patches or in none is an error."""
    edges = [[0] * w for _ in range(h)]
    for y, x, edge in patches:
        for row in range(y, y + edge):
            for column in range(x, x + edge):
                assert edges[row][column] == 0
                edges[row][column] = edge
    assert all(map(all, edges))
    return edges


def merge_blocks(ranks, h, w):
    """Merge the blocks of one frame, cheapest first, and give the partition after each merge.

    `ranks` are unique numbers by cell, the higher the longer it stays. A block may merge once it
    holds one token in each of its four parts; it costs the second highest rank in it. Yields sets
    of frozensets of cells, from fine to one.
    """
    parts = {frozenset([(y, x)]) for y in range(h) for x in range(w)}
    blocks = []
    edge = 2
    while edge < 2 * max(h, w):
        for y in range(0, h, edge):
            for x in range(0, w, edge):
                cells = frozenset(
                    (r, c) for r in range(y, min(y + edge, h)) for c in range(x, min(x + edge, w))
                )
                if len(cells) > 1:
                    cost = sorted(ranks[r][c] for r, c in cells)[-2]
                    blocks.append((cost, edge, cells))
        edge *= 2
    yield parts
    for _, _, cells in sorted(blocks, key=lambda block: block[:2]):
        inside = {part for part in parts if part <= cells}
        if len(inside) > 1:
            parts = (parts - inside) | {cells}
            yield parts
