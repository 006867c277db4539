"""Merging in plain loops: of tokens, in a timm ViT by hand, and in any host with split blocks."""

import torch
import torch.nn.functional as F

import adaptok


def merge_by_hand(metric, x, sizes, start, r):
    """Merge tokens of one sample, one after the other.

    Args:
        metric: `(m e)`.
        x: `(m d)`.
        sizes: a number per token.
        start: row of the first token in the sequence; a row in front of it never merges.
        r: how many tokens of even rows go into one of an odd row.

    Returns:
        For each new token the old ones in it, the one whose place it has first; features; sizes.
    """
    evens = [j for j in range(len(x)) if (start + j) % 2 == 0]
    odds = [j for j in range(len(x)) if (start + j) % 2 == 1]
    partner, score = {}, {}
    for i in evens:
        for j in odds:
            cosine = float(F.cosine_similarity(metric[i].double(), metric[j].double(), dim=0))
            if i not in score or cosine > score[i]:
                partner[i], score[i] = j, cosine
    merged = sorted(score, key=lambda i: -score[i])[:r]
    groups = [[i] for i in evens if i not in merged]
    groups += [[j, *(i for i in sorted(merged) if partner[i] == j)] for j in odds]
    features, weights = [], []
    for group in groups:
        weight = sum(sizes[i] for i in group)
        features.append(sum(sizes[i] * x[i] for i in group) / weight)
        weights.append(weight)
    return groups, torch.stack(features), weights


def run_vit_by_hand(vit, images, rates, proportional):
    """Run a plain timm ViT with a class token as the paper says, sample by sample.

    The class token is row 0, so that it is in A, and never merges; partners are looked for among
    all rows of B. Returns the features behind the last norm of the class token, and for each
    sample the groups of cells.
    """
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    outs, all_groups = [], []
    for sample in range(len(x)):
        rows, sizes = x[sample], [1.0] * x.shape[1]
        groups = [[row - 1] for row in range(x.shape[1])]
        for block, r in zip(vit.blocks, rates, strict=True):
            attn, (s, d) = block.attn, rows.shape
            q, k, v = attn.qkv(block.norm1(rows)).view(s, 3, attn.num_heads, -1).unbind(1)
            mixed = torch.empty_like(q)
            for head in range(attn.num_heads):
                logits = q[:, head] @ k[:, head].T * q.shape[-1] ** -0.5
                if proportional:
                    logits = logits + torch.tensor(sizes).log()
                mixed[:, head] = logits.softmax(-1) @ v[:, head]
            rows = rows + block.ls1(attn.proj(mixed.reshape(s, d)))
            if r:
                merged, tokens, sums = merge_by_hand(
                    k.mean(1)[1:], rows[1:], sizes[1:], 1, min(r, (s - 1) // 2)
                )
                rows, sizes = torch.cat([rows[:1], tokens]), [1.0, *sums]
                cells = groups[1:]
                groups = [groups[0], *([c for i in m for c in cells[i]] for m in merged)]
            rows = rows + block.ls2(block.mlp(block.norm2(rows)))
        outs.append(vit.norm(rows[:1])[0])
        all_groups.append(groups[1:])
    return torch.stack(outs), all_groups


class MergeByHand(adaptok.Stage):
    """Runs the halves of a host's blocks, and merges between them in loops.

    Args:
        r: how many tokens merge at each block.
        proportional: whether sizes count in attention.
    """

    effects = adaptok.Effects("tokens", changes_count=True, needs_keys=True)

    def __init__(self, r, proportional=True):
        super().__init__()
        self.r = r
        self.proportional = proportional

    def forward(self, inner, call):
        """Run the blocks, sample by sample."""
        halves, n = inner.split(), call.num_cells
        xs, rests = [], []
        for sample in range(len(call.x)):
            short = call.take(torch.arange(n)[None], None, torch.tensor([sample]))
            sizes, owner = [1.0] * n, list(range(n))
            for block in range(inner.first, inner.last):
                bias = torch.zeros(1, short.x.shape[1])
                bias[0, call.start : call.start + short.num_cells] = torch.tensor(sizes).log()
                attended = halves.attend(
                    block, short, key_bias=bias if self.proportional else None, keys=True
                )
                short, keys = attended.call, attended.keys[0].mean(0)
                cells = keys[call.start : call.start + short.num_cells]
                groups, x, sizes = merge_by_hand(cells, short.cell_x[0], sizes, call.start, self.r)
                place = {old: new for new, group in enumerate(groups) for old in group}
                owner = [place[old] for old in owner]
                short = short.take(torch.tensor([[group[0] for group in groups]]), x[None])
                short = halves.finish(block, short)
            xs.append(short.cell_x[:, owner])
            rests.append(short.rest_x)
        return call.put(torch.cat(xs), torch.cat(rests), call.streams)


def merge_cells_by_hand(x, destinations, count):
    """Merge tokens of one sample into destinations until `count` are left; groups of tokens."""
    others = [i for i in range(len(x)) if i not in destinations]
    partner, score = {}, {}
    for i in others:
        for j in destinations:
            cosine = float(F.cosine_similarity(x[i].double(), x[j].double(), dim=0))
            if i not in score or cosine > score[i]:
                partner[i], score[i] = j, cosine
    merged = sorted(score, key=lambda i: -score[i])[: len(x) - count]
    return [
        [i, *(k for k in sorted(merged) if partner[k] == i)]
        for i in range(len(x))
        if i not in merged
    ]


class MergeBlocksByHand(adaptok.Stage):
    """Runs each block on merged tokens, and moves all tokens, sample by sample.

    Args:
        find: destinations of a grid and a block.
        count: tokens that blocks run on.
        mlp: whether whole blocks do.
    """

    effects = adaptok.Effects("tokens", changes_count=True, needs_keys=True)

    def __init__(self, find, count, mlp=True):
        super().__init__()
        self.find = find
        self.count = count
        self.mlp = mlp

    def forward(self, inner, call):
        """Run the blocks."""
        n, ended = call.num_cells, []
        for sample in range(len(call.x)):
            one = call.take(torch.arange(n)[None], None, torch.tensor([sample]))
            for block in range(inner.first, inner.last):
                x = one.cell_x[0]
                groups = merge_cells_by_hand(x, self.find(call.grid, block), self.count)
                means = torch.stack([x[group].mean(0) for group in groups])
                places = torch.tensor([[group[0] for group in groups]])
                short = one.take(places, means[None])
                if self.mlp:
                    after = inner.run(short, block, block + 1)
                else:
                    after = inner.split().attend(block, short).call
                moved = x.clone()
                for number, group in enumerate(groups):
                    for cell in group:
                        moved[cell] += after.cell_x[0, number] - means[number]
                one = one.put(moved[None], after.rest_x, after.streams)
                one = one if self.mlp else inner.split().finish(block, one)
            ended.append(one)
        streams = {
            name: None if value is None else torch.cat([end.streams[name] for end in ended])
            for name, value in ended[0].streams.items()
        }
        rest = torch.cat([end.rest_x for end in ended])
        return call.put(torch.cat([end.cell_x for end in ended]), rest, streams)
