"""Real pipelines of diffusers with small transformers of the catalogue; prompts are embedded."""

import diffusers
import torch
from backbones.diffusers_checks import find

from adaptok.testing.models import fill_weights

STEPS = 2
TEXT = 7


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_vae():
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.0,
    )  # fmt: skip
    return fill_weights(vae).eval()


def make_video_vae():
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, temperal_downsample=[False, True, True],
    )  # fmt: skip
    return fill_weights(vae).eval()


class Dit:
    case, order, calls = "dit", ("cond", "uncond"), 1

    def make(self, transformer):
        scheduler = diffusers.DDIMScheduler()
        return diffusers.DiTPipeline(transformer, make_vae(), scheduler)

    def build(self):
        """DiT whose class without a label is the one that its pipeline counts on."""
        config = {k: v for k, v in find("dit").build().config.items() if not k.startswith("_")}
        config["num_embeds_ada_norm"] = 1000
        return fill_weights(diffusers.DiTTransformer2DModel(**config)).eval()

    def arguments(self, guided):
        return {"class_labels": [1, 2], "guidance_scale": 4.0 if guided else 1.0}


class PixArt:
    case, order, calls = "pixart", ("uncond", "cond"), 1

    def make(self, transformer):
        scheduler = diffusers.DDIMScheduler()
        return diffusers.PixArtAlphaPipeline(None, None, make_vae(), transformer, scheduler)

    def arguments(self, guided):
        mask = torch.ones(2, TEXT).long()
        mask[1, 3:] = 0
        return {
            "prompt_embeds": noise(2, TEXT, 20),
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": noise(2, TEXT, 20, seed=1),
            "negative_prompt_attention_mask": mask,
            "negative_prompt": None,
            "guidance_scale": 4.0 if guided else 1.0,
            "use_resolution_binning": False,
            "height": 16,
            "width": 24,
        }


class StableDiffusion3:
    case, order, calls = "sd3.5", ("uncond", "cond"), 1

    def make(self, transformer):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        others = [None] * 6
        return diffusers.StableDiffusion3Pipeline(transformer, scheduler, make_vae(), *others)

    def arguments(self, guided):
        return {
            "prompt_embeds": noise(2, TEXT, 20),
            "negative_prompt_embeds": noise(2, TEXT, 20, seed=1),
            "pooled_prompt_embeds": noise(2, 24, seed=2),
            "negative_pooled_prompt_embeds": noise(2, 24, seed=3),
            "guidance_scale": 4.0 if guided else 1.0,
            "height": 20,
            "width": 28,
        }


class Flux:
    case, order, calls = "flux", ("cond", "uncond"), 2

    def make(self, transformer):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return diffusers.FluxPipeline(
            scheduler, make_vae(), None, None, None, None, transformer, None, None
        )

    def arguments(self, guided):
        return {
            "prompt_embeds": noise(2, TEXT, 20),
            "negative_prompt_embeds": noise(2, TEXT, 20, seed=1),
            "pooled_prompt_embeds": noise(2, 24, seed=2),
            "negative_pooled_prompt_embeds": noise(2, 24, seed=3),
            "true_cfg_scale": 4.0 if guided else 1.0,
            "height": 20,
            "width": 28,
        }


class ZImage:
    case, order, calls = "z_image", ("cond", "uncond"), 1

    def make(self, transformer):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        return diffusers.ZImagePipeline(scheduler, make_vae(), None, None, transformer)

    def arguments(self, guided):
        return {
            "prompt_embeds": [noise(5, 20), noise(40, 20, seed=1)],
            "negative_prompt_embeds": [noise(3, 20, seed=2), noise(3, 20, seed=3)],
            "guidance_scale": 4.0 if guided else 0.0,
            "height": 20,
            "width": 28,
        }


class Wan:
    case, order, calls = "wan", ("cond", "uncond"), 2

    def make(self, transformer):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return diffusers.WanPipeline(None, None, make_video_vae(), scheduler, transformer)

    def arguments(self, guided):
        return {
            "prompt_embeds": noise(1, TEXT, 20),
            "negative_prompt_embeds": noise(1, TEXT, 20, seed=1),
            "guidance_scale": 4.0 if guided else 1.0,
            "num_frames": 5,
            "height": 48,
            "width": 64,
        }


PIPELINES = {cls.__name__: cls() for cls in (Dit, PixArt, StableDiffusion3, Flux, ZImage, Wan)}


def make_pipeline(name):
    """Return a pipeline whose transformer is not wrapped."""
    kind = PIPELINES[name]
    pipe = kind.make(kind.build() if hasattr(kind, "build") else find(kind.case).build())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(name, pipe, guided=True, **options):
    """Return images or a video of a fixed seed, before they are rounded."""
    given = {
        "generator": torch.Generator().manual_seed(7),
        "num_inference_steps": STEPS,
        "output_type": "np",
        "return_dict": False,
    }
    out = pipe(**(given | PIPELINES[name].arguments(guided) | options))[0]
    return torch.as_tensor(out)
