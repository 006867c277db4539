"""Wrap the DiT of a diffusers pipeline, and see its tokens along the denoising of real images.

Usage: python examples/wrap_dit_in_pipeline.py [--output FOLDER] [--drop 0.5] [--steps 5]

The pipeline begins with noised emoji, as image-to-image pipelines do. The DiT is small, and its
weights are random, since no download is needed here: it cleans nothing. The fresh router ranks the
cells by how badly their neighbours predict them. The half of guidance without a class gets fewer
tokens (Lite-CFG).
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel

import adaptok
from adaptok.see import save_figure, show_trajectory
from adaptok.train.data import load_emoji
from adaptok.train.pixels import to_latent, to_uint8

SIZE, PATCH, STRENGTH, GUIDANCE = 64, 4, 0.2, 1.5


class Emoji2Emoji(DiffusionPipeline):
    """Noises images a little, and denoises them."""

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, steps: int
    ) -> list[torch.Tensor]:
        """Return what the model was given in each step."""
        self.scheduler.set_timesteps(round(steps / STRENGTH))
        times = self.scheduler.timesteps[-steps:]
        x = self.scheduler.add_noise(images, torch.randn_like(images), times[:1])
        labels, seen = torch.cat([labels, torch.full_like(labels, 10)]), []  # 10: no class
        for t in times:
            seen.append(x)
            noise = self.transformer(torch.cat([x, x]), t.expand(2 * len(x)), labels).sample
            cond, uncond = noise.chunk(2)
            x = self.scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
        return seen


def main() -> None:
    """Wrap, sample, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder")
    parser.add_argument("--drop", type=float, default=0.5, help="share of the cells to drop")
    parser.add_argument("--uncond-drop", type=float, default=0.75, help="the same without a class")
    parser.add_argument("--steps", type=int, default=5, help="denoising steps")
    options = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4}
    grid = {"sample_size": SIZE, "patch_size": PATCH, "in_channels": 3}
    dit = DiTTransformer2DModel(**sizes, **grid, num_embeds_ada_norm=1000).eval()
    pipe = Emoji2Emoji(dit, DDIMScheduler())
    adaptok.wrap(pipe.transformer, chunker="dc", budget={"drop": options.drop})
    adaptok.set_budget(pipe.transformer, drop=options.drop, uncond_drop=options.uncond_drop)
    emoji = load_emoji(size=SIZE, split="test", categories=["Food & Drink"], skin_variants=False)
    images = to_latent(emoji.take([1, 4]))
    with adaptok.trace(pipe.transformer) as trace:
        seen = pipe(images, torch.tensor([3, 7]), options.steps)
    kept, ms = trace.steps[-1].kept.tolist(), sum(step.ms for step in trace.steps)
    print(f"{len(trace.steps)} steps, the blocks took {ms:.0f} ms; kept in the last: {kept}")

    given = [to_uint8(torch.cat([x, x])) for x in seen]
    names, title = ("with a class", "without a class"), "Cells that run in both halves of guidance"
    figure = show_trajectory(trace, given, samples=[0, 2], names=names, title=title)
    print(f"see {save_figure(figure, options.output / 'pipeline.png')}")


if __name__ == "__main__":
    main()
