"""Feature extractors: names, weights, pixels, and what a bad one gives."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from adaptok.errors import CheckpointError, ConfigError, DataError, ShapeError
from adaptok.measure.distances import kernel_distance
from adaptok.measure.extractors import (
    EfficientNetFeatures,
    Extractor,
    FeatureExtractor,
    extract_features,
    load_extractor,
)
from adaptok.train.data import load_emoji

WEIGHTS = "weights/efficientnet_lite0.safetensors"


class Colours(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(images.float().mean((2, 3)))


class Stub(nn.Module):
    """What the wrapper needs of timm's model."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward_features(self, x):
        return x * self.scale

    def forward_head(self, x, pre_logits):
        assert pre_logits
        return x.flatten(1)


@pytest.fixture(scope="module")
def timm_model():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("tf_efficientnet_lite0")


@pytest.fixture(scope="module")
def weights(timm_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite.safetensors"
    save_file(timm_model.state_dict(), path)
    return path


def make_images(n, size=16):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


class TestOwn:
    def test_module_is_put_into_eval(self):
        extractor = load_extractor(Colours())
        images = make_images(4)
        assert isinstance(extractor, FeatureExtractor)
        assert extractor.label == "Colours"
        assert torch.equal(extractor(images), images.float().mean((2, 3)))

    def test_callable_and_label(self):
        def edges(images):
            return images.float().diff(dim=3).abs().mean((2, 3))

        assert load_extractor(edges).label == "edges"
        assert load_extractor(edges, label="mine").label == "mine"
        assert load_extractor(lambda images: images).label == "own"

    def test_weights_belong_into_it(self):
        with pytest.raises(ConfigError, match=r"'x\.safetensors' were given beside"):
            load_extractor(Colours(), "x.safetensors")

    def test_no_extractor(self):
        with pytest.raises(ConfigError, match="a int is no extractor"):
            load_extractor(3)


class TestEfficientNet:
    def test_pixels(self):
        model = EfficientNetFeatures(Stub(), edge=8)
        images = make_images(2, 8)
        expected = ((images.float() - 127) / 128).flatten(1)
        assert torch.equal(model(images), expected)
        larger = make_images(2, 20)
        small = F.interpolate(larger.float(), (8, 8), mode="bilinear", antialias=True)
        assert torch.allclose(model(larger), ((small - 127) / 128).flatten(1))

    def test_weights_of_a_file(self, timm_model, weights):
        extractor = load_extractor("efficientnet-lite0", weights)
        assert extractor.label == "EffLite0"
        assert extractor.weights.startswith("lite.safetensors, sha256 ")
        assert "128 px" in extractor.rule
        found = extract_features(extractor, [make_images(2, 32)])
        assert found.shape == (2, 1280)
        ours = extractor.run.model.state_dict()
        assert all(torch.equal(ours[name], own) for name, own in timm_model.state_dict().items())
        assert not extractor.run.training

    def test_no_weights(self):
        with pytest.raises(ConfigError, match="needs weights: give a safetensors file, or the"):
            load_extractor("efficientnet-lite0")

    @pytest.mark.parametrize("name", ["inception-v3", "FID", "InceptionV3"])
    def test_nothing_is_called_fid(self, name):
        with pytest.raises(ConfigError, match="FID belongs to the weights of one Inception-v3"):
            load_extractor(name)

    def test_unknown_name(self):
        with pytest.raises(ConfigError, match="no extractor 'resnet50': give efficientnet-lite0"):
            load_extractor("resnet50")

    def test_missing_or_foreign_file(self, tmp_path, timm_model):
        with pytest.raises(CheckpointError, match="there is no file"):
            load_extractor("efficientnet-lite0", tmp_path / "none.safetensors")
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"no tensors")
        with pytest.raises(CheckpointError, match="no complete safetensors file"):
            load_extractor("efficientnet-lite0", broken)
        save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
        with pytest.raises(CheckpointError, match="does not hold the weights of timm's tf_eff"):
            load_extractor("efficientnet-lite0", tmp_path / "foreign.safetensors")

    def test_download_only_when_asked(self, monkeypatch, timm_model, weights):
        import timm

        asked = []

        def create(name, pretrained=False):
            asked.append(pretrained)
            if pretrained:
                raise OSError("no network here")
            return timm_model

        monkeypatch.setattr(timm, "create_model", create)
        load_extractor("efficientnet-lite0", weights)
        assert asked == [False]
        with pytest.raises(CheckpointError, match=r"could not fetch .* \(no network here\)"):
            load_extractor("efficientnet-lite0", "download")
        assert asked == [False, True]


class TestExtract:
    def test_batches_do_not_matter(self):
        extractor = load_extractor(Colours())
        images = make_images(7)
        whole = extract_features(extractor, [images])
        assert torch.equal(extract_features(extractor, images.split(3)), whole)
        assert not whole.requires_grad

    def test_names_what_is_not_finite(self):
        def spoil(images):
            features = images.float().mean((2, 3))
            return torch.where(images[:, 0, 0, :1] == 255, torch.nan, features)

        images = make_images(5).clamp(max=254)
        images[3, 0, 0, 0] = 255
        names = [f"{place}.png" for place in range(5)]
        with pytest.raises(DataError, match=r"the features of 3\.png are NaN"):
            extract_features(spoil, images.split(2), names=names)
        with pytest.raises(DataError, match="the features of image 3 are NaN"):
            extract_features(spoil, images.split(2))

    @pytest.mark.parametrize(
        ("extractor", "got"),
        [
            (lambda images: images.float(), r"\(2, 3, 16, 16\)"),
            (lambda images: images.float().mean((2, 3))[:1], r"\(1, 3\)"),
            (lambda images: [0], "list"),
        ],
    )
    def test_wrong_shape(self, extractor, got):
        with pytest.raises(ShapeError, match=f"gave {got} for 2 images"):
            extract_features(extractor, [make_images(2)])

    def test_no_image(self):
        with pytest.raises(DataError, match="no image to take features of"):
            extract_features(Colours(), [])

    def test_words(self):
        extractor = Extractor("a", Colours(), "none", "random")
        assert repr(extractor) == "Extractor(label='a', rule='none', weights='random')"


@pytest.mark.slow
def test_real_weights_order_damage(shared_folder):
    pytest.importorskip("timm")
    extractor = load_extractor("efficientnet-lite0", shared_folder / WEIGHTS)
    images = load_emoji(size=32, skin_variants=False).take(torch.arange(0, 1200, 10))
    even, odd = images[::2], images[1::2]
    noise = 60 * torch.randn(odd.shape)
    worse = [
        odd,
        (odd.float() + noise / 3).clamp(0, 255).byte(),
        (odd + noise).clamp(0, 255).byte(),
    ]
    real = extract_features(extractor, even.split(32))
    found = [kernel_distance(extract_features(extractor, x.split(32)), real) for x in worse]
    assert found == sorted(found)
    assert abs(found[0]) < found[1] / 2
