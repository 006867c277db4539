import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from adaptok.errors import DataError, DtypeError, MissingPackageError
from adaptok.train import data
from adaptok.train.data import ImageSet, load_image_folder, load_npz, open_image_set

RED, GREEN, BLUE = (200, 10, 20), (10, 180, 30), (30, 20, 190)


def save(path, colour=RED, size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def centre(image):
    return image[:, image.shape[1] // 2, image.shape[2] // 2].tolist()


# Folders


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "set" / "cat" / "b.png", RED)
    save(tmp_path / "set" / "cat" / "deeper" / "a.JPG", GREEN, format="JPEG")
    save(tmp_path / "set" / "ant" / "1.png", BLUE)
    (tmp_path / "set" / "ant" / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "set" / "ant" / "._1.png").write_bytes(b"what some systems leave behind")
    return tmp_path / "set"


def test_folder_of_classes(folder):
    images = load_image_folder(folder, size=16)
    assert images.class_names == ("ant", "cat")
    assert images.labels.tolist() == [0, 1, 1]
    assert images.name == "set"
    assert len(images) == 3
    assert images.image_size == (16, 16)
    taken = images.take([2, 0])
    assert taken.shape == (2, 3, 16, 16)
    assert taken.dtype == torch.uint8
    assert np.abs(np.subtract(centre(taken[0]), GREEN)).max() <= 3
    assert centre(taken[1]) == list(BLUE)
    assert torch.equal(images[-1], images.take(torch.tensor([2]))[0])
    assert images.take([]).shape == (0, 3, 16, 16)


def test_folder_is_decoded_only_when_taken(folder):
    broken = folder / "cat" / "z.png"
    broken.write_bytes((folder / "cat" / "b.png").read_bytes()[:60])
    images = load_image_folder(folder, size=16)
    assert len(images) == 4
    assert images.take([0, 1, 2]).shape[0] == 3
    with pytest.raises(DataError, match=r"cannot read the image .*z\.png .*replace or remove"):
        images.take([0, 3])


def test_flat_folder_is_one_class(tmp_path):
    save(tmp_path / "b.png", RED)
    save(tmp_path / "a.png", BLUE)
    (tmp_path / "empty").mkdir()
    images = load_image_folder(tmp_path, size=8)
    assert images.class_names == (tmp_path.name,)
    assert images.labels.tolist() == [0, 0]
    assert centre(images[0]) == list(BLUE)


def test_bad_folders(tmp_path, folder):
    with pytest.raises(DataError, match=r"nowhere is no folder: give a folder"):
        load_image_folder(tmp_path / "nowhere", size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no image: put images \(.bmp"):
        load_image_folder(tmp_path / "empty", size=8)
    with pytest.raises(DataError, match="image size is 0"):
        load_image_folder(folder, size=0)
    (folder / "dog").mkdir()
    with pytest.raises(DataError, match=r"class folder .*dog holds no image: fill or remove"):
        load_image_folder(folder, size=8)
    save(folder / "loose.png")
    with pytest.raises(DataError, match="both images and class folders"):
        load_image_folder(folder, size=8)


def test_images_behind_links_count(tmp_path, folder):
    save(tmp_path / "elsewhere" / "c.png", RED)
    (folder / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "deeper" / "up").symlink_to(folder / "cat")  # which would never end
    assert load_image_folder(folder, size=16).labels.tolist() == [0, 1, 1, 1]
    (folder / "cat" / "dead.png").symlink_to(tmp_path / "nothing.png")
    images = load_image_folder(folder, size=16)
    with pytest.raises(DataError, match=r"cannot read the image .*dead\.png"):
        images.take(range(len(images)))
    (folder / "dog").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="dog is a link to nothing: mend or remove it"):
        load_image_folder(folder, size=16)


# Files of arrays


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 10, 14, 3), dtype=np.uint8)


def test_npz_in_both_orders(tmp_path, pixels):
    labels = np.array([2, 0, 1, 2, 0])
    last = load_npz(write_npz(tmp_path / "last.npz", images=pixels, labels=labels))
    first = load_npz(
        write_npz(tmp_path / "first.npz", images=pixels.transpose(0, 3, 1, 2), labels=labels)
    )
    assert torch.equal(last.images, first.images)
    assert last.images.shape == (5, 3, 10, 14)
    assert last.images[3, 1, 2, 9] == pixels[3, 2, 9, 1]
    assert last.labels.tolist() == labels.tolist()
    assert last.labels.dtype == torch.int64
    assert last.class_names == ("0", "1", "2")
    assert last.name == "last"
    assert last.image_size == (10, 14)


def test_npz_channels(tmp_path, pixels):
    labels = np.arange(5, dtype=np.uint8)
    grey = load_npz(write_npz(tmp_path / "g.npz", images=pixels[..., :1], labels=labels))
    assert torch.equal(grey.images[:, 0], torch.from_numpy(pixels[..., 0].copy()))
    assert torch.equal(grey.images[:, 0], grey.images[:, 2])
    alpha = np.concatenate([pixels, np.full((5, 10, 14, 1), 51, np.uint8)], axis=3)
    mixed = load_npz(write_npz(tmp_path / "a.npz", images=alpha, labels=labels))
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) * 0.2 + 255 * 0.8
    assert (mixed.images - expected).abs().max() <= 0.51


def test_npz_resizes(tmp_path, pixels):
    path = write_npz(tmp_path / "x.npz", images=pixels, labels=np.zeros(5, int))
    small = load_npz(path, size=5)
    assert small.images.shape == (5, 3, 5, 5)
    cropped = torch.from_numpy(pixels[:, :, 2:12]).permute(0, 3, 1, 2).float()
    mean = torch.nn.functional.avg_pool2d(cropped, 2)
    assert (small.images - mean).abs().mean() < 15
    with pytest.raises(DataError, match="image size is -1"):
        load_npz(path, size=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "has no array labels: it needs images and labels"),
        ({"images": None, "labels": None}, "has no array images and labels"),
        ({"images": np.zeros((5, 3, 8, 8), np.float32)}, "have dtype float32: give uint8"),
        ({"images": np.zeros((5, 8, 8), np.uint8)}, r"have shape \(5, 8, 8\): give \(n, h, w, c\)"),
        ({"images": np.zeros((5, 8, 8, 2), np.uint8)}, r"have shape \(5, 8, 8, 2\)"),
        ({"images": np.zeros((5, 0, 8, 3), np.uint8)}, "give at least one pixel"),
        ({"labels": np.zeros(4, int)}, "has 5 images and 4 labels"),
        ({"labels": np.zeros(5)}, r"labels of .* have dtype float64"),
        ({"labels": np.zeros((5, 2), int)}, r"shape \(5, 2\): give one whole number per image"),
        ({"labels": np.array([0, 1, -1, 0, 0])}, "lie in -1 to 1: number the classes from 0"),
        ({"labels": np.full(5, 10**9)}, "number the classes from 0"),
        ({"labels": np.array([None] * 5)}, r"cannot read .*allow_pickle=False"),
    ],
)
def test_bad_npz(tmp_path, pixels, change, message):
    arrays = {"images": pixels, "labels": np.zeros(5, int), **change}
    path = write_npz(tmp_path / "x.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(DataError, match=message):
        load_npz(path)


def test_empty_npz(tmp_path):
    path = write_npz(
        tmp_path / "x.npz", images=np.zeros((0, 8, 8, 3), np.uint8), labels=np.zeros(0, np.uint8)
    )
    with pytest.raises(DataError, match=r"x holds no image|at least one pixel"):
        load_npz(path)


def test_damaged_npz(tmp_path, pixels):
    path = write_npz(tmp_path / "x.npz", images=pixels, labels=np.zeros(5, int))
    content = path.read_bytes()
    np.savez_compressed(tmp_path / "small.npz", images=pixels, labels=np.zeros(5, int))
    small = (tmp_path / "small.npz").read_bytes()
    np.save(tmp_path / "array.npy", pixels)
    damages = {
        "none": b"",
        "text": b"hello",
        "half": content[: len(content) // 2],
        "compressed": small[:300] + bytes(50) + small[350:],
        "inside": content[:300] + bytes(50) + content[350:],
        "pickle": pickle.dumps({"images": 1}),
        "array": (tmp_path / "array.npy").read_bytes(),
    }
    for name, damaged in damages.items():
        bad = tmp_path / f"{name}.npz"
        bad.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"cannot read .*{name}\.npz"):
            load_npz(bad)
    with pytest.raises(DataError, match="cannot read"):
        load_npz(tmp_path / "missing.npz")


# Sets


def make_set(n=4, labels=None, names=("a", "b")):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 6, 8)
    return ImageSet(images, torch.tensor(labels or [0, 1] * (n // 2)), names, "tiny")


def test_take_keeps_the_order_given():
    images = make_set()
    assert images.take([3, 0, 3, -1])[:, 0, 0, 0].tolist() == [3, 0, 3, 3]
    assert images.take(torch.tensor([2, 1], dtype=torch.int32))[:, 0, 0, 0].tolist() == [2, 1]
    assert images.take(range(2)).shape == (2, 3, 6, 8)
    assert images.take([]).shape == (0, 3, 6, 8)
    assert images[2].shape == (3, 6, 8)
    assert images.image_size == (6, 8)
    with pytest.raises(IndexError):
        images.take([4])
    with pytest.raises(IndexError):
        images[4]


@pytest.mark.parametrize(
    "indices", [torch.tensor([True, False, True, False]), [0.0, 1.0], torch.zeros(2, 2).long()]
)
def test_take_refuses_other_indices(indices):
    with pytest.raises(DtypeError, match="give a list of whole numbers"):
        make_set().take(indices)


def test_set_checks_its_labels():
    with pytest.raises(DataError, match="tiny has 4 images and 3 labels"):
        make_set(labels=[0, 1, 0])
    with pytest.raises(DataError, match="tiny has labels from 0 to 2 and 2 class names"):
        make_set(labels=[0, 1, 2, 0])
    with pytest.raises(DataError, match="labels from -1 to 1"):
        make_set(labels=[0, 1, -1, 0])


def test_set_checks_its_images():
    grey = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"x has images of torch.uint8 and shape \(2, 1, 4, 4\)"):
        ImageSet(grey, torch.zeros(2).long(), ("a",), "x")


def test_open_by_what_a_person_types(tmp_path, folder, pixels, monkeypatch):
    path = write_npz(tmp_path / "x.npz", images=pixels, labels=np.zeros(5, int))
    assert open_image_set(str(folder), size=12).take([0]).shape == (1, 3, 12, 12)
    assert open_image_set(str(path), size=12).images.shape == (5, 3, 12, 12)
    emoji = open_image_set("emoji", size=32)
    assert emoji.name == "emoji-train"
    assert emoji.image_size == (32, 32)
    save(tmp_path / "emoji" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_image_set("./emoji", size=8)) == 1
    with pytest.raises(DataError, match="data 'cifar' is not found: give emoji, a folder"):
        open_image_set("cifar", size=32)
    (tmp_path / "x.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"x.txt' is neither a folder nor an .npz file"):
        open_image_set(str(tmp_path / "x.txt"), size=32)


def test_missing_pillow_is_said(folder, monkeypatch):
    images = load_image_folder(folder, size=8)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingPackageError, match=r'pip install "adaptok\[train\]"'):
        images.take([0])
    with pytest.raises(MissingPackageError, match="PIL"):
        data.load_emoji()
