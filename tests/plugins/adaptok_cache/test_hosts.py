"""Models of diffusers: pipelines with and without requests, cache contexts, text beside images."""

import copy

import pytest
import torch
from adaptok_cache import IdleCacheWarning, TaylorSeer, TeaCache

import adaptok
from adaptok.testing.models import fill_weights

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, layers_per_block=1
    )
    fill_weights(transformer).eval()
    pipe = diffusers.DiTPipeline(transformer, vae.eval(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, seed=0, steps=6):
    images = pipe(
        class_labels=[3, 7],
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=steps,
        output_type="np",
    ).images
    return torch.from_numpy(images)


@pytest.fixture
def with_cache(pipeline):
    def make(stage):
        pipe = copy.deepcopy(pipeline)
        pipe.set_progress_bar_config(disable=True)
        adaptok.wrap(pipe.transformer, stack=[stage])
        return pipe

    return make


@pytest.mark.parametrize("name", ["teacache", "firstblock", "taylorseer"])
def test_a_pipeline_reuses_steps_inside_a_request(pipeline, with_cache, name):
    options = {} if name == "taylorseer" else {"threshold": 1e9}
    pipe = with_cache({"name": name, **options})
    stage = pipe.transformer.transformer_blocks.stages[0]
    with adaptok.request(pipe.transformer, "one"):
        first = draw(pipe)
        # four samples: two images, each with and without its class
        assert stage.reused == 4 * (4 if name != "taylorseer" else 3)
        other = draw(pipe, seed=1, steps=5)
        assert torch.equal(draw(pipe), first)
    assert not torch.equal(first, other)
    assert not torch.equal(first, draw(pipeline))
    fresh = with_cache({"name": name, **options})
    with adaptok.request(fresh.transformer, "another"):
        assert torch.equal(draw(fresh), first)


def test_threshold_0_is_bit_exact_in_a_pipeline(pipeline, with_cache):
    pipe = with_cache(TeaCache(0.0))
    with adaptok.request(pipe.transformer, "one"):
        assert torch.equal(draw(pipe), draw(pipeline))


def test_a_pipeline_without_a_request_computes_and_says_so(pipeline, with_cache):
    pipe = with_cache(TeaCache(1e9))
    with pytest.warns(IdleCacheWarning, match="does not know whose steps") as seen:
        found = draw(pipe)
    assert len([w for w in seen if w.category is IdleCacheWarning]) == 1
    assert torch.equal(found, draw(pipeline))


@pytest.fixture
def flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return fill_weights(model).eval()


def give_flux(b, t, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in ((b, 6, 4), (b, 5, 32), (b, 32))]
    rows = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0))
    return {
        "hidden_states": drawn[0] * (1 + t),
        "encoder_hidden_states": drawn[1],
        "pooled_projections": drawn[2],
        "timestep": torch.full((b,), t),
        "img_ids": rows,
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


@torch.no_grad()
def walk_flux(model, branches, seeds, name=True):
    """One call per branch and step, as Flux with true guidance; return outputs by branch."""
    outs = {branch: [] for branch in branches}
    for t in (0.9, 0.7, 0.5, 0.3, 0.1):
        for branch, seed in zip(branches, seeds, strict=True):
            with model.cache_context(branch):
                outs[branch].append(model(**give_flux(2, t, seed))[0])
    return outs


def test_cache_contexts_of_diffusers_name_the_branch(flux):
    """Without adaptok.request: what a pipeline says by cache_context is enough."""
    stage = TeaCache(1e9)
    model = adaptok.wrap(copy.deepcopy(flux), stack=[stage])
    found = walk_flux(model, ("cond", "uncond"), (1, 2))
    assert (stage.computed, stage.reused) == (2 * 2 * 2, 2 * 2 * 3)
    for branch, seed in (("cond", 1), ("uncond", 2)):
        fresh = adaptok.wrap(copy.deepcopy(flux), stack=[TeaCache(1e9)])
        alone = walk_flux(fresh, (branch,), (seed,))[branch]
        assert all(map(torch.equal, found[branch], alone))
    assert not torch.equal(found["cond"][-1], walk_flux(flux, ("cond",), (1,))["cond"][-1])
    again = walk_flux(model, ("cond", "uncond"), (3, 4))  # the next picture
    fresh = adaptok.wrap(copy.deepcopy(flux), stack=[TeaCache(1e9)])
    expected = walk_flux(fresh, ("cond", "uncond"), (3, 4))
    for branch in again:
        assert all(map(torch.equal, again[branch], expected[branch]))


@pytest.mark.parametrize("stage", [TeaCache(0.0), TaylorSeer(interval=1)])
def test_text_beside_the_image_is_exact_where_all_is_computed(flux, stage):
    model = adaptok.wrap(copy.deepcopy(flux), stack=[stage])
    found = walk_flux(model, ("cond",), (1,))["cond"]
    assert all(map(torch.equal, found, walk_flux(flux, ("cond",), (1,))["cond"]))


def test_a_part_of_a_batch_takes_its_text_along(flux):
    """Sample 1 jumps, and is computed alone; it is what it would be by itself."""
    stage = TeaCache(0.6)
    model = adaptok.wrap(copy.deepcopy(flux), stack=[stage])
    flags = []
    with torch.no_grad(), adaptok.request(model, "one"):
        for t in (0.9, 0.8, 0.7, 0.6, 0.5):
            given = give_flux(2, t, 1)
            if t < 0.65:
                given["hidden_states"][1] *= -3.0
            out = model(**given)[0]
            plain = flux(**given)[0]
            flags.append(stage.last_computed)
            for i, ran in enumerate(stage.last_computed):
                assert torch.allclose(out[i], plain[i], atol=1e-4) == ran
    assert (False, True) in flags
