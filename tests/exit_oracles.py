"""Exits as a loop over single images would take them, and models whose samples leave apart."""

import torch
import torch.nn.functional as F

import adaptok
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights

DEPTH = 6
BLOCKS = (2, 4)
SCALES = torch.tensor([1.0, 0.3, 2.0, 0.6, 1.5])[:, None, None, None]
IMAGES = SCALES * torch.randn(5, 3, 32, 48, generator=torch.Generator().manual_seed(3))


def stage_of(model, name="exit"):
    return model.blocks.adaptok[name]


def wrap_exits(stack=(), depth=DEPTH, leave=True, verify=True, **options):
    """A ViT with exits whose weights all matter, of whose images some leave at each."""
    spec = {"name": "exit", "blocks": BLOCKS} | options
    model = adaptok.wrap(make_vit(depth), stack=[spec, *stack], verify=verify)
    fill_weights(stage_of(model), seed=4)
    if leave:
        set_apart(model)
    return model.eval()


def set_apart(model, images=IMAGES):
    """Set thresholds so that two images of five leave at the first exit, and one at the second."""
    stage = stage_of(model)
    with torch.no_grad(), stage.record() as records:
        model(images)
        first, second = (
            judge(call).sigmoid()
            for judge, call in zip(stage.judges, records[0].exits, strict=True)
        )
    order = first.argsort(descending=True)
    low = float((first[order[1]] + first[order[2]]) / 2)
    rest = second[order[2:]].sort(descending=True).values
    stage.set_threshold((low, float((rest[0] + rest[1]) / 2)))
    return order


def leave_one_by_one(vit, stage, images, blocks=BLOCKS):
    """What an unwrapped ViT answers, image by image and block by block, with the depth of each."""
    outs, depths = [], []
    limits = [judge.limit.item() for judge in stage.judges]
    with torch.no_grad():
        for image in images:
            x = vit._pos_embed(vit.patch_embed(image[None]))
            depth = len(vit.blocks)
            for index, block in enumerate(vit.blocks):
                if index in blocks:
                    number = blocks.index(index)
                    judge, adapter = stage.judges[number], stage.adapters[number]
                    token = torch.cat([x[0, 0], x[0, 1:].mean(0)])
                    token = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
                    token = token * judge.norm.weight + judge.norm.bias
                    hidden = F.gelu(judge.hidden.weight @ token + judge.hidden.bias)
                    logit = float(judge.out.weight[0] @ hidden + judge.out.bias[0])
                    if 1 / (1 + torch.tensor(-logit).exp()) > limits[number]:
                        x = x + adapter.norm(x) @ adapter.linear.weight.T + adapter.linear.bias
                        depth = index
                        break
                x = block(x)
            outs.append(vit.forward_head(vit.norm(x)))
            depths.append(depth)
    return torch.cat(outs), depths


def run_traced(model, *args):
    with torch.no_grad(), adaptok.trace(model) as seen:
        out = model(*args)
    return out, seen.steps[0]


def count_samples(blocks):
    """Count the samples that each block gets; the hook stays."""
    counts = [0] * len(blocks)
    for index, block in enumerate(blocks):

        def count(_, args, index=index):
            counts[index] += args[0].shape[0]

        block.register_forward_pre_hook(count)
    return counts


def draw_task(count, seed):
    """Images of six patterns under noise of all strengths, `(n 3 32 32)`."""
    patterns = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(6, (count,), generator=generator)
    strength = torch.rand(count, generator=generator)[:, None, None, None]
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return patterns[kinds] + 2.5 * strength**2 * noise


def make_task_vit():
    """A ViT of random weights whose answers to the task are of all classes."""
    vit = make_vit(DEPTH, width=48)
    with torch.no_grad():
        vit.head.bias -= vit(draw_task(300, seed=7)).mean(0)
        vit.head.weight *= 4
        vit.head.bias *= 4
    return vit
