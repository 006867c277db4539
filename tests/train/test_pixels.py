import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adaptok.errors import DataError, DtypeError, ShapeError
from adaptok.train.pixels import (
    decode_image,
    depth_to_space,
    space_to_depth,
    to_latent,
    to_uint8,
)

RED, GREEN, BLUE = (200, 10, 20), (10, 180, 30), (30, 20, 190)


def save(path, colour=RED, size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def centre(image):
    return image[:, image.shape[1] // 2, image.shape[2] // 2].tolist()


def test_to_latent_and_back_is_exact_for_each_byte():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    latent = to_latent(images)
    assert latent.dtype == torch.float32
    assert latent.min() == -1
    assert latent.max() == 1
    assert torch.equal(to_uint8(latent), images)
    assert torch.equal(to_uint8(latent.double()), images)


@given(st.floats(-5, 5, width=32))
def test_to_uint8_is_the_nearest_byte(value):
    byte = to_uint8(torch.full((1, 1, 1), value)).item()
    clipped = min(max(value, -1.0), 1.0)
    assert abs(byte - (clipped + 1) * 127.5) <= 0.5 + 1e-4


def test_pixel_dtypes():
    with pytest.raises(DtypeError, match=r"to_latent got torch.float32: give uint8"):
        to_latent(torch.zeros(1, 3, 4, 4))
    with pytest.raises(DtypeError, match=r"to_uint8 got torch.uint8: give floats"):
        to_uint8(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)
)
def test_space_to_depth_round_trip(b, c, h, w, factor):
    x = torch.randn(b, c, h * factor, w * factor)
    folded = space_to_depth(x, factor)
    assert folded.shape == (b, c * factor**2, h, w)
    assert torch.equal(depth_to_space(folded, factor), x)
    assert torch.equal(folded, torch.nn.functional.pixel_unshuffle(x, factor))


def test_space_to_depth_refuses_what_does_not_fit():
    with pytest.raises(ShapeError, match="grid of 6x5 and factor 2"):
        space_to_depth(torch.zeros(1, 3, 6, 5), 2)
    with pytest.raises(ShapeError, match="factor 0"):
        space_to_depth(torch.zeros(1, 3, 6, 5), 0)
    with pytest.raises(ShapeError, match="6 channels and factor 2"):
        depth_to_space(torch.zeros(1, 6, 4, 4), 2)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_truncated_and_foreign_files(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = tmp_path / f"whole.{ending}"
    Image.fromarray(noise).save(whole)
    assert decode_image(whole, 32).shape == (3, 32, 32)
    content = whole.read_bytes()
    damages = {"none": b"", "text": b"hello", "half": content[: len(content) // 2]}
    for name, damaged in damages.items():
        path = tmp_path / f"{name}.{ending}"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"cannot read the image .*{name}\.{ending}"):
            decode_image(path, 32)
    with pytest.raises(DataError, match="cannot read the image"):
        decode_image(tmp_path / "missing.png", 32)


def test_image_that_is_a_bomb(tmp_path, monkeypatch):
    save(tmp_path / "big.png", size=(300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(DataError, match=r"cannot read the image .*big.png"):
        decode_image(tmp_path / "big.png", 32)


def test_crop_takes_the_centre_undistorted(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = RED, GREEN, BLUE
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.swapaxes(0, 1)).save(tmp_path / "high.png")
    for name in ("wide", "high"):
        image = decode_image(tmp_path / f"{name}.png", 10)
        assert (image - torch.tensor(GREEN).view(3, 1, 1)).abs().max() <= 12  # the filter rings


def test_resize_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert (decode_image(tmp_path / "stripes.png", 16).float() - 127.5).abs().max() < 12


def test_large_jpeg_is_decoded_small_but_sharp(tmp_path):
    image = np.zeros((512, 512, 3), np.uint8)
    image[:256] = 255
    Image.fromarray(image).save(tmp_path / "large.jpg", quality=95)
    small = decode_image(tmp_path / "large.jpg", 32)
    assert small[:, :15].min() > 245
    assert small[:, 17:].max() < 10


def test_modes_become_rgb_on_white(tmp_path):
    save(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")
    save(tmp_path / "half.png", (0, 0, 0, 128), mode="RGBA")
    save(tmp_path / "grey.png", 77, mode="L")
    save(tmp_path / "grey_clear.png", (0, 0), mode="LA")
    save(tmp_path / "bit.png", 1, mode="1")
    save(tmp_path / "deep.png", 0x4000, mode="I;16")
    save(tmp_path / "cmyk.jpg", (0, 255, 255, 0), mode="CMYK", quality=95)
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, *GREEN])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "palette_clear.png", transparency=1)
    expected = {
        "clear.png": (255, 255, 255),
        "half.png": (127, 127, 127),
        "grey.png": (77, 77, 77),
        "grey_clear.png": (255, 255, 255),
        "bit.png": (255, 255, 255),
        "deep.png": (64, 64, 64),
        "cmyk.jpg": (255, 0, 0),
        "palette.png": GREEN,
        "palette_clear.png": (255, 255, 255),
    }
    for name, colour in expected.items():
        found = centre(decode_image(tmp_path / name, 16))
        assert np.abs(np.subtract(found, colour)).max() <= 3, (name, found)
    save(tmp_path / "float.tif", 0.5, mode="F")
    with pytest.raises(DataError, match="32 bits per channel, 8 or 16 are needed"):
        decode_image(tmp_path / "float.tif", 16)


def test_camera_rotation_is_applied(tmp_path):
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:10] = RED
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = decode_image(tmp_path / "turned.png", 20)
    assert image[:, 10, 18].tolist() == list(RED)
    assert image[:, 10, 1].tolist() == [0, 0, 0]
