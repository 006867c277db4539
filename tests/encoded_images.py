"""Tiny folders of images, and tiny autoencoders that react to them."""

import numpy as np
import torch


def make_images(folder, counts, size=20, seed=0):
    """Write images that all differ, one folder per class; not square, and not symmetric."""
    from PIL import Image

    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (size, size + 5, 3)).astype(np.uint8)
            pixels[:, size // 2 :] //= 2
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder


def make_vae(folder, seed=0, factor=2, channels=4, **options):
    """Write a random autoencoder whose means and deviations are of the order of one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = factor.bit_length()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )
    with torch.no_grad():
        vae.quant_conv.weight.mul_(3)
        vae.quant_conv.bias.normal_()
    vae.save_pretrained(folder)
    return folder
