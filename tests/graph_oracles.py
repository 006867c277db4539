"""Loops that say what graphs, segments and merges must be."""

import itertools


def neighbours_by_loop(grid, neighbours):
    """Pairs of flat cells that touch, in both directions."""
    cells = list(itertools.product(*map(range, grid)))
    pairs = set()
    for (i, here), (j, there) in itertools.product(enumerate(cells), repeat=2):
        steps = [abs(a - b) for a, b in zip(here, there, strict=True)]
        in_plane, in_time = steps[-2:], steps[:-2]
        if sum(steps) == 1 or (
            neighbours == 8 and not any(in_time) and max(in_plane) == 1 and i != j
        ):
            pairs.add((i, j))
    return pairs


def count_components(members, pairs):
    """How many connected parts a set of cells has, by union-find."""
    parent = {cell: cell for cell in members}

    def find(cell):
        while parent[cell] != cell:
            cell = parent[cell]
        return cell

    for a, b in pairs:
        if a in parent and b in parent:
            parent[find(a)] = find(b)
    return len({find(cell) for cell in members})


def assert_segments(segment, pairs, count):
    """One sample has so many segments, each of one piece."""
    names = set(segment.tolist())
    assert len(names) == count
    for name in names:
        members = (segment == name).nonzero().flatten().tolist()
        assert count_components(members, pairs) == 1, members


class Merger:
    """Regions of one sample as lists of cells, and the cost of merging two of them."""

    def __init__(self, z, reluctance):
        self.z, self.reluctance = z.double(), reluctance.double()
        self.regions = {i: [i] for i in range(len(z))}

    def cost(self, i, j):
        a, b = self.regions[i], self.regions[j]
        gap = (self.z[a].mean(0) - self.z[b].mean(0)).square().sum()
        weight = len(a) * len(b) / (len(a) + len(b))
        return float(gap * weight * max(self.reluctance[a].max(), self.reluctance[b].max()))

    def merge(self, i, j, edges):
        """Put j into i, and return the edges that are left."""
        self.regions[i] += self.regions.pop(j)
        moved = {(i if a == j else a, i if b == j else b) for a, b in edges}
        return {(min(e), max(e)) for e in moved if e[0] != e[1]}


def merge_greedily(z, reluctance, pairs, count):
    """Segments of one sample, the cheapest pair of regions merged again and again."""
    merger, edges = Merger(z, reluctance), {(i, j) for i, j in pairs if i < j}
    while len(merger.regions) > count:
        i, j = min(edges, key=lambda edge: merger.cost(*edge))
        edges = merger.merge(i, j, edges)
    return sorted(sorted(members) for members in merger.regions.values())


def merge_by_rounds(z, reluctance, pairs):
    """All merges of one sample as (cost, round, kept, merged): pairs that prefer each other."""
    merger, edges = Merger(z, reluctance), {(i, j) for i, j in pairs if i < j}
    inner, merges = dict.fromkeys(range(len(z)), 0.0), []
    for turn in range(len(z)):
        costs = {edge: merger.cost(*edge) for edge in edges}
        best = {
            i: min((e for e in edges if i in e), key=costs.__getitem__)
            for i in merger.regions
            if any(i in e for e in edges)
        }
        for i, j in {e for e in best.values() if best[e[0]] == best[e[1]] == e}:
            inner[i] = max(costs[i, j], inner[i], inner[j])
            merges.append((inner[i], turn, i, j))
            edges = merger.merge(i, j, edges)
    return merges


def cut_by_loop(merges, n, count):
    """Segments of one sample when only the cheapest merges are done."""
    parent = list(range(n))

    def find(cell):
        return cell if parent[cell] == cell else find(parent[cell])

    for _, _, i, j in sorted(merges)[: n - count]:
        parent[find(j)] = find(i)
    names = [find(cell) for cell in range(n)]
    return sorted([i for i, name in enumerate(names) if name == one] for one in set(names))


def members_of(segment):
    """Segments of one sample as sorted lists of cells."""
    names = segment.tolist()
    return sorted([i for i, name in enumerate(names) if name == one] for one in set(names))


def lost_share(z, segment):
    """The part of the variance of one sample that means of segments do not hold."""
    lost = 0.0
    for members in members_of(segment):
        lost += float((z[members] - z[members].mean(0)).square().sum())
    return lost / float((z - z.mean(0)).square().sum())
