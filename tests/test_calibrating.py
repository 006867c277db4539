"""One calibrator: shards, files, refusals, and what it leaves alone."""

import copy
import json

import pytest
import torch
from adaptok_cache import TeaCache
from hypothesis import given
from hypothesis import strategies as st

import adaptok
from adaptok.calibrated import CalibrationRecord
from adaptok.calibrating import calibrate
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig
from adaptok.errors import ConfigError, DataError, NotWrappedError, ProfileError
from adaptok.profiles import Profile
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights

WISH = {"tome": {"keep": 0.6}}


def wrap_vit(depth=4, **options):
    torch.manual_seed(0)
    stack = ["exit", {"name": "tome", "r": 2, **options}, "evit"]
    return adaptok.wrap(make_vit(depth), stack=stack, budget=0.5)


def draw_batches(count=6, b=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, 3, 32, 48, generator=generator) for _ in range(count)]


def wrap_dit():
    config = DiTConfig(hidden_size=64, depth=3, num_heads=4, latent_size=(8, 12), num_classes=5)
    dit = fill_weights(DiT(config)).eval()
    return adaptok.wrap(dit, stack=[TeaCache(), {"name": "tome", "r": 2}])


def walk(seed, drawn=False):
    """A walk over noisy latents; `drawn`: with random numbers of its own."""

    def run(model):
        generator = torch.Generator().manual_seed(seed)
        x, clean = (torch.randn(2, 4, 8, 12, generator=generator) for _ in range(2))
        for i, t in enumerate((900.0, 700.0, 500.0, 300.0, 100.0, 50.0, 10.0)):
            noise = 0.1 * torch.randn(2, 4, 8, 12) if drawn else 0.0
            model(x + 0.1 * i**2 * clean + noise, torch.full((2,), t), torch.tensor([1, 2]))

    return run


def settings_of(model):
    return {
        name: copy.deepcopy(stage.read_settings())
        for name, stage in model.blocks.adaptok.items()
        if hasattr(stage, "read_settings")
    }


def near(one, two):
    """Whether plain values are equal up to 1e-6."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(near(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(near, one, two))
    if isinstance(one, float):
        return one == pytest.approx(two, abs=1e-6, rel=1e-6)
    return one == two


@pytest.mark.parametrize("count", [2, 3])
def test_shards_through_files_equal_one_run(tmp_path, count):
    model, batches = wrap_vit(), draw_batches(7)
    whole = calibrate(model, batches, wanted=WISH)
    for i in range(count):
        part = calibrate(model, iter(batches), wanted=WISH, shard=(i, count))
        assert part.stages != whole.stages
        part.save(tmp_path / f"{i}.json")
    parts = [Profile.load(tmp_path / f"{i}.json") for i in range(count)]
    for order in (parts, parts[::-1]):
        merged = Profile.merge(order)
        assert near(merged.model_dump(), whole.model_dump())
        assert merged.samples == 28
        assert merged._records == whole._records


def test_shards_of_walks_with_random_numbers_equal_one_run():
    model, walks = wrap_dit(), [walk(seed, drawn=True) for seed in range(4)]
    whole = calibrate(model, walks, sampler="ddim", steps=7)
    assert set(whole.stages) == {"teacache", "tome"}
    parts = [calibrate(model, walks, sampler="ddim", steps=7, shard=(i, 2)) for i in (1, 0)]
    merged = Profile.merge(parts)
    assert near(merged.model_dump(), whole.model_dump())
    assert merged.sampler == "ddim"


def test_what_cannot_be_merged_is_refused(tmp_path):
    model, batches = wrap_vit(), draw_batches(4)
    one, two = (calibrate(model, batches, shard=(i, 2)) for i in range(2))
    with pytest.raises(ProfileError, match="there is no profile to merge"):
        Profile.merge([])
    with pytest.raises(ProfileError, match=r"all shards .* merged at once.*got \(0, 2\)$"):
        Profile.merge([one])
    with pytest.raises(ProfileError, match=r"got \(0, 2\), \(0, 2\)"):
        Profile.merge([one, one])
    with pytest.raises(ProfileError, match="profiles of other stages or wishes"):
        Profile.merge([one, calibrate(model, batches, shard=(1, 2), wanted=WISH)])
    with pytest.raises(ProfileError, match="with another holdout cannot be merged"):
        Profile.merge([one, calibrate(model, batches, shard=(1, 2), holdout=0.25)])
    with pytest.raises(ProfileError, match="with another host cannot be merged"):
        Profile.merge([one, calibrate(wrap_vit(5), batches, shard=(1, 2))])
    two.save(tmp_path / "two.json", records=False)
    with pytest.raises(ProfileError, match=r"shard \(1, 2\) has no records to merge: save it with"):
        Profile.merge([one, Profile.load(tmp_path / "two.json")])
    one.save(tmp_path / "one.json")
    (tmp_path / "one.safetensors").replace(tmp_path / "two.safetensors")
    with pytest.raises(ProfileError, match="holds the records of another profile"):
        Profile.load(tmp_path / "two.json")
    record = CalibrationRecord({(3, 1): {"x": (1.0,)}})
    with pytest.raises(DataError, match="both records hold sample 1 of batch 3"):
        record.merge(record)


def test_a_profile_is_the_same_after_a_file_and_is_applied(tmp_path):
    model = wrap_vit()
    profile = calibrate(model, draw_batches(), wanted=WISH)
    assert profile.unfit == ("evit",)
    assert profile.grids == ((4, 6),)
    assert profile.describe()[-1] == "evit: nothing to fit"
    path = tmp_path / "profile.json"
    profile.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text())["stages"]["tome"]["settings"]["r"] is None
    other = wrap_vit()
    Profile.load(path).apply(other, grid=(4, 6))
    threshold = profile.stages["tome"].settings["threshold"]
    assert settings_of(other)["tome"] == {"threshold": threshold, "r": None}


def test_files_that_are_no_profile_are_refused(tmp_path):
    with pytest.raises(ProfileError, match="this is no profile: cannot read"):
        Profile.load(tmp_path / "none.json")
    path = tmp_path / "broken.json"
    path.write_text("{}")
    with pytest.raises(ProfileError, match=r"this is no profile: .*host"):
        Profile.load(path)
    calibrate(wrap_vit(), draw_batches(2)).save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(ProfileError, match="up to version 1: install a newer adaptok"):
        Profile.load(path)


def test_another_model_grid_sampler_or_stage_is_refused_and_stays_as_it_was():
    profile = calibrate(wrap_vit(), draw_batches(), wanted=WISH)
    torch.manual_seed(0)
    shorter = adaptok.wrap(make_vit(4), stack=["exit", "tome", "evit"], span=(0, 3), budget=0.5)
    without = adaptok.wrap(make_vit(4), stack=["evit", "exit"], budget=0.5)
    for model, options, message in (
        (wrap_vit(5), {}, "4 blocks.*and the model is .*5 blocks"),
        (shorter, {}, r"span \(0, 4\).*span \(0, 3\)"),
        (wrap_vit(), {"grid": (6, 4)}, r"made on the grid \(4, 6\), and \(6, 4\) is asked for"),
        (wrap_vit(), {"sampler": "ddim"}, "made without one as the sampler, and 'ddim' is"),
        (wrap_vit(), {"steps": 9}, "made without one as the number of steps, and 9 is"),
        (without, {}, "settings of 'tome' for the stage 'tome', and the model has exit, evit"),
    ):
        before = settings_of(model)
        with pytest.raises(ProfileError, match=message):
            profile.apply(model, **options)
        assert settings_of(model) == before
    with pytest.raises(NotWrappedError, match="is not wrapped"):
        profile.apply(make_vit())


def test_a_refusal_of_one_stage_undoes_the_others():
    model = wrap_vit()
    profile = calibrate(model, draw_batches(), wanted=WISH)
    fits = dict(profile.stages)
    fits["exit"] = fits["exit"].model_copy(update={"settings": {"threshold": [0.5, 0.5]}})
    fits["tome"] = fits["tome"].model_copy(update={"settings": {"threshold": 7.0, "r": None}})
    before = settings_of(model)
    with pytest.raises(ProfileError, match="does not fit the model: threshold is a cosine"):
        profile.model_copy(update={"stages": fits}).apply(model)
    assert settings_of(model) == before


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "walk"])
def test_nan_names_its_batch_and_leaves_the_model_as_it_was(form):
    model, batches = wrap_vit(), draw_batches(3)
    model.train()
    batches[2][1, 2, 3, 4] = float("nan")
    forms = {
        "tensor": lambda x: x,
        "tuple": lambda x: (x,),
        "dict": lambda x: {"x": x},
        "walk": lambda x: lambda m: m(x),
    }
    before, weights = settings_of(model), copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    with pytest.raises(DataError, match=r"batch 2 (holds|brings) NaN or infinity"):
        calibrate(model, [forms[form](x) for x in batches], wanted=WISH)
    assert settings_of(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert not model.blocks.observers
    assert not any(stage.aside for stage in model.blocks.stages)
    assert model.blocks.adaptok["exit"].records is None


def test_weights_that_make_nan_are_named_too():
    model = wrap_vit()
    with torch.no_grad():
        model.blocks.blocks[3].mlp.fc2.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="batch 0 makes the blocks answer with NaN"):
        calibrate(model, draw_batches(2))


def test_other_bad_input_is_refused():
    model, batches = wrap_vit(), draw_batches(2)
    with pytest.raises(NotWrappedError, match="is not wrapped"):
        calibrate(make_vit(), batches)
    with pytest.raises(ConfigError, match=r"holdout is a share in \(0, 1\), got 1.0"):
        calibrate(model, batches, holdout=1.0)
    with pytest.raises(ConfigError, match=r"shard is \(i, n\).*got \(2, 2\)"):
        calibrate(model, batches, shard=(2, 2))
    with pytest.raises(ConfigError, match="wanted of 'evit', and this model has exit, tome to fit"):
        calibrate(model, batches, wanted={"evit": {"keep": 0.5}})
    with pytest.raises(DataError, match="two batches or two samples are needed"):
        calibrate(model, [])
    with pytest.raises(DataError, match="batch 0 did not call the model"):
        calibrate(model, [lambda model: None])
    with pytest.raises(ConfigError, match=r"a batch is a tensor.*got a str"):
        calibrate(model, ["x"])


def test_a_model_with_nothing_to_fit_says_so():
    model = adaptok.wrap(make_vit(), stack=["evit", "dc"], budget=0.5)
    profile = calibrate(model, draw_batches(1))
    assert set(profile.unfit) == {"dc", "evit"}
    assert profile.stages == {}


@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=9),
    holdout=st.floats(0.01, 0.99),
)
def test_a_split_loses_nothing_and_keeps_batches_together(counts, holdout):
    rows = {(b, s): {"x": (float(b), float(s))} for b, c in enumerate(counts) for s in range(c)}
    record = CalibrationRecord(rows)
    groups = len(counts) if len(counts) > 1 else counts[0]
    if groups < 2:
        with pytest.raises(DataError, match="two batches or two samples"):
            record.split(holdout)
        return
    chosen, held_out = record.split(holdout)
    assert chosen.rows
    assert held_out.rows
    assert {**chosen.rows, **held_out.rows} == rows
    assert len(chosen) + len(held_out) == len(rows)
    if len(counts) > 1:
        batches = [{b for b, _ in part.rows} for part in (chosen, held_out)]
        assert not batches[0] & batches[1]
        assert abs(len(batches[1]) - holdout * groups) <= 1
    assert CalibrationRecord.from_tensors(record.to_tensors()) == record


def test_a_wish_that_is_no_mapping_is_refused():
    with pytest.raises(ConfigError, match="what is wanted of 'tome' is a mapping such as"):
        calibrate(wrap_vit(), draw_batches(), wanted={"tome": 0.5})
    for keep in ("half", True, float("nan")):
        with pytest.raises(ConfigError, match=r"keep is a share in \(0, 1\), got"):
            calibrate(wrap_vit(), draw_batches(), wanted={"tome": {"keep": keep}})
