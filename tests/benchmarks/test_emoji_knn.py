"""The pure functions of the k-NN benchmark."""

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adaptok import is_wrapped
from adaptok.errors import DataError
from adaptok.train.emoji import EmojiEntry, read_emoji_index
from benchmarks.emoji_knn.images import (
    TARBALL,
    flatten_on_white,
    load_pictures,
    split_bases,
)
from benchmarks.emoji_knn.intervals import Interval, bootstrap_difference, bootstrap_mean
from benchmarks.emoji_knn.measuring import (
    RouterCase,
    RouterRuns,
    Run,
    extract_features,
    run_router,
    split_batches,
)
from benchmarks.emoji_knn.models import FeatureModel, restore_floats
from benchmarks.emoji_knn.neighbours import classify, compare_centred, match_labels
from benchmarks.emoji_knn.scoring import FLOOR, Row, Task, choose_router, tabulate
from benchmarks.emoji_knn.tables import format_rows, summarise_unwrapped


def make_entry(base, category="Food", variant=False, code=None):
    return EmojiEntry(code or base, base, category, "", variant, base, "train")


def make_webp(size, box, colour):
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((*colour, 255), box)
    target = io.BytesIO()
    image.save(target, "WEBP", lossless=True)
    return target.getvalue()


@pytest.fixture(scope="module")
def split():
    return split_bases(read_emoji_index().entries, references=20, queries=30)


class TestSplit:
    def test_no_base_is_in_two_parts(self, split):
        parts = [
            {entry.base for entry in part}
            for half in (split.choice, split.report)
            for part in (half.references, half.queries)
        ]
        assert sum(map(len, parts)) == len(set.union(*parts)) > 700

    def test_references_are_balanced_and_queries_capped(self, split):
        for half in (split.choice, split.report):
            for part, most in ((half.references, 20), (half.queries, 30)):
                categories = [entry.category for entry in part]
                counts = {name: categories.count(name) for name in categories}
                assert len(counts) == 8
                assert max(counts.values()) == most
            assert min(counts.values()) >= 20

    def test_has_neither_skin_variants_nor_two_pictures_of_a_base(self, split):
        entries = [*split.choice.references, *split.choice.queries]
        assert not any(entry.is_skin_variant for entry in entries)
        assert len({entry.base for entry in entries}) == len(entries)

    def test_more_queries_leave_the_references_alone(self, split):
        larger = split_bases(read_emoji_index().entries, references=20, queries=40)
        assert larger.report.references == split.report.references
        assert set(split.report.queries) < set(larger.report.queries)

    def test_the_order_of_the_table_does_not_matter(self):
        entries = [make_entry(f"{i:x}") for i in range(30)]
        assert split_bases(entries, 3, 5) == split_bases(entries[::-1], 3, 5)

    def test_the_first_picture_stands_for_a_base(self):
        entries = [make_entry(f"{i:x}", variant=i == 3) for i in range(9)]
        entries += [replace(make_entry("0"), code_points="0-2640")]
        split = split_bases(entries, 1, 9)
        halves = (split.choice, split.report)
        used = [e for half in halves for e in (*half.references, *half.queries)]
        assert {e.code_points for e in used} == {f"{i:x}" for i in range(9)} - {"3"}

    def test_too_few_bases_are_refused(self):
        entries = [make_entry(f"{i:x}") for i in range(8)]
        with pytest.raises(DataError, match="'Food' has 4 base emoji: ask for fewer than 4"):
            split_bases(entries, 4, 1)


class TestPictures:
    @pytest.fixture
    def shared(self, tmp_path):
        pictures = {
            "a1": make_webp((32, 32), (0, 0, 16, 32), (255, 0, 0)),
            "b2": make_webp((32, 40), (0, 0, 32, 40), (0, 0, 255)),
        }
        path = tmp_path / TARBALL
        path.parent.mkdir()
        with tarfile.open(path, "w:gz") as archive:
            for name, content in pictures.items():
                info = tarfile.TarInfo(f"package/assets/{name}.webp")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return tmp_path

    def test_come_in_the_order_asked_for(self, shared, tmp_path):
        entries = [make_entry("b2"), make_entry("a1")]
        found = load_pictures(entries, shared, 16, tmp_path / "cache")
        assert found.shape == (2, 16, 16, 3)
        assert found[0, 8, 8].tolist() == [0, 0, 255]
        assert found[1, 8, 2].tolist() == [255, 0, 0]
        assert found[1, 8, 13].tolist() == [255, 255, 255]

    def test_the_cache_grows_and_serves_without_the_tarball(self, shared, tmp_path):
        cache = tmp_path / "cache"
        first = load_pictures([make_entry("a1")], shared, 16, cache)
        load_pictures([make_entry("b2")], shared, 16, cache)
        (shared / TARBALL).unlink()
        again = load_pictures([make_entry("a1"), make_entry("b2")], shared, 16, cache)
        assert np.array_equal(again[:1], first)

    def test_a_missing_picture_is_named(self, shared, tmp_path):
        with pytest.raises(DataError, match=r"1 pictures are not in .*, c3 first"):
            load_pictures([make_entry("a1"), make_entry("c3")], shared, 16, tmp_path / "cache")

    def test_a_tall_picture_is_padded_and_not_squeezed(self):
        pixels = flatten_on_white(make_webp((20, 40), (0, 0, 20, 40), (0, 255, 0)), 40)
        assert pixels[20, 20].tolist() == [0, 255, 0]
        assert pixels[20, 3].tolist() == pixels[20, 36].tolist() == [255, 255, 255]


class TestNeighbours:
    def test_the_majority_of_the_nearest_wins(self):
        references = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, -0.3], [-1.0, 0.2], [-1.7, 0.0]])
        labels = torch.tensor([2, 0, 0, 1, 1])
        assert classify(torch.tensor([[1.0, 0.0], [-2.0, 0.1]]), references, labels, 3)[0] == 0
        assert classify(torch.tensor([[-1.0, 0.2]]), references, labels, 1)[0] == 1

    def test_a_tie_goes_to_the_nearer_voters(self):
        references = torch.tensor([[1.0, 0.1], [1.0, -0.3], [-2.0, 0.2]])
        labels = torch.tensor([1, 0, 2])
        assert classify(torch.tensor([[1.0, 0.1]]), references, labels, 2).tolist() == [1]

    def test_a_common_direction_changes_nothing(self):
        generator = torch.Generator().manual_seed(0)
        references = torch.randn(40, 6, generator=generator)
        queries = torch.randn(25, 6, generator=generator)
        labels = torch.arange(40) % 4
        moved = classify(queries + 30, references + 30, labels, 5)
        assert moved.tolist() == classify(queries, references, labels, 5).tolist()
        assert moved.unique().numel() > 1

    def test_uncentred_similarity_would_answer_otherwise(self):
        offset = torch.tensor([50.0, 50.0])
        references = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]) + offset
        query = torch.tensor([[3.0, -2.0]]) + offset
        assert classify(query, references, torch.tensor([0, 1, 2]), 1).tolist() == [0]

    def test_all_neighbours_of_one_class_cannot_be_outvoted_by_similarity(self):
        references = torch.tensor([[1.0, 0], [-1.0, 0.4], [-1.0, 0.2]])  # two far ones of a class
        labels = torch.tensor([0, 1, 1])
        assert classify(torch.tensor([[1.0, 0.0]]), references, labels, 3).tolist() == [1]

    def test_too_few_references_are_refused(self):
        with pytest.raises(ValueError, match="k=3 needs at least 3 references, got 2"):
            classify(torch.ones(1, 2), torch.eye(2), torch.arange(2), 3)

    def test_hits_are_per_query(self):
        x = torch.eye(3)
        hits = match_labels(x, torch.tensor([0, 2, 2]), x, torch.arange(3), 1)
        assert hits.tolist() == [True, False, True]

    @given(st.floats(0.1, 100.0))
    def test_cosine_ignores_length_and_sees_direction(self, factor):
        mean = torch.tensor([3.0, -1.0])
        x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        y = torch.tensor([[factor, 0.0], [0.0, -factor]])
        found = compare_centred(x + mean, y + mean, mean)
        assert torch.allclose(found, torch.tensor([1.0, -1.0]), atol=1e-4)


class TestIntervals:
    def test_width_is_that_of_the_normal_law(self):
        values = torch.cat([torch.zeros(200), torch.ones(200)])
        found = bootstrap_mean(values, seed=0)
        assert found.mean == 0.5
        assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
        assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)

    def test_same_seed_same_interval(self):
        values = torch.rand(50, generator=torch.Generator().manual_seed(1))
        assert bootstrap_mean(values, 3) == bootstrap_mean(values, 3) != bootstrap_mean(values, 4)

    def test_what_both_share_cancels(self):
        hard = torch.randn(300, generator=torch.Generator().manual_seed(0))
        found = bootstrap_difference(hard + 0.05, hard, seed=0)
        assert (found.low, found.high) == pytest.approx((0.05, 0.05), abs=1e-6)
        alone = bootstrap_mean(hard, seed=0)
        assert alone.high - alone.low > 0.2

    def test_unequal_and_empty_are_refused(self):
        with pytest.raises(ValueError, match="same pictures twice, got 3 and 2"):
            bootstrap_difference(torch.ones(3), torch.ones(2), 0)
        with pytest.raises(ValueError, match="at least one value"):
            bootstrap_mean(torch.ones(0), 0)


def make_task():
    references = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    labels = torch.tensor([0, 1, 2, 3])
    return Task(references, labels, references * 2, labels, k=1, seed=0)


def make_runs(features, *, ms=5.0):
    return RouterRuns({0.5: Run(tuple(features), 99.0, 4e9, ms)}, 10.0, 8e9)


class TestScoring:
    def test_rows_compare_with_the_mean_of_random_passes(self):
        task = make_task()
        swapped = task.queries[[1, 0, 2, 3]]
        runs = {"good": make_runs([task.queries]), FLOOR: make_runs([task.queries, swapped])}
        good, floor = tabulate(task, runs)
        assert (good.router, good.keep, good.tokens) == ("good", 0.5, 99.0)
        assert good.accuracy.mean == 1.0
        assert good.cosine.mean == pytest.approx(1.0)
        assert good.over_random.mean == pytest.approx(0.25)
        assert floor.accuracy.mean == pytest.approx(0.75)
        assert floor.over_random == Interval(0.0, 0.0, 0.0)
        assert floor.cosine.mean == pytest.approx(0.5)
        assert (good.gflops, good.unwrapped_gflops) == (4.0, 8.0)

    def test_the_best_mean_over_models_and_budgets_is_chosen(self):
        def row(router, keep, accuracy, cosine=0.5):
            flat = Interval(accuracy, accuracy, accuracy)
            return Row(router, keep, 1, 1, 1, 1, 1, flat, flat, Interval(cosine, cosine, cosine))

        one = [row("a", 0.5, 0.6), row("b", 0.5, 0.5), row(FLOOR, 0.5, 0.9), row("b", 0.9, 1.0)]
        two = [row("a", 0.5, 0.4), row("b", 0.5, 0.6), row(FLOOR, 0.5, 0.9), row("a", 0.9, 0.1)]
        assert choose_router([one, two], [0.5]) == "b"
        assert choose_router([one], [0.5]) == "a"
        tie = [row("a", 0.5, 0.5, 0.7), row("b", 0.5, 0.5, 0.8)]
        assert choose_router([tie], [0.5]) == "b"

    def test_the_table_says_time_beside_operations(self):
        task = make_task()
        runs = {FLOOR: make_runs([task.queries])}
        lines = format_rows(tabulate(task, runs), summarise_unwrapped(task)).splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert lines[-1].startswith("| random | 0.5 | 99 | 4.0 (0.50) | 5 (0.50) | 1.000 [")
        assert "+0.0 [+0.0, +0.0]" in lines[-1]


def test_int8_weights_are_scaled_by_row():
    stored = {
        "w.int8": torch.tensor([[1, -2], [3, 4]], dtype=torch.int8),
        "w.scale": torch.tensor([0.5, 10.0]),
        "bias": torch.tensor([7.0]),
    }
    found = restore_floats(stored)
    assert found.keys() == {"w", "bias"}
    assert found["w"].tolist() == [[0.5, -1.0], [30.0, 40.0]]


def test_batches_cover_all_pictures_in_order():
    pictures = np.arange(7)
    parts = list(split_batches(pictures, 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert np.concatenate(parts).tolist() == pictures.tolist()


class TinyHost(FeatureModel):
    name, file, grid, prefix = "tiny", "none", (2, 3), 1
    mean, deviation = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def load(self, path):
        from adaptok.testing import make_vit

        return make_vit()

    def extract(self, images):
        return self.model(images)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return TinyHost(tmp_path_factory.mktemp("none"))


class TestRuns:
    def test_a_full_budget_gives_the_unwrapped_features(self, host, pictures):
        before = extract_features(host, pictures, batch=2)
        case = RouterCase("predictability", "predictability")
        runs = run_router(host, pictures, case, (1.0, 0.5), None, batch=2)
        full, half = runs.by_keep[1.0], runs.by_keep[0.5]
        assert torch.allclose(full.features[0], before, atol=1e-5)
        assert not torch.allclose(half.features[0], before, atol=1e-2)
        assert (full.tokens, half.tokens) == (7, 4)
        assert half.flops < full.flops == pytest.approx(runs.unwrapped_flops, rel=0.1)
        assert min(full.ms, half.ms, runs.unwrapped_ms) > 0
        assert torch.equal(extract_features(host, pictures, batch=2), before)
        assert not is_wrapped(host.model)

    def test_random_passes_differ_by_seed_and_repeat(self, host, pictures):
        case = RouterCase(FLOOR, FLOOR, (0, 1))
        first, second = (
            run_router(host, pictures, case, (0.5,), (1, 3), batch=5).by_keep[0.5].features
            for _ in range(2)
        )
        assert not torch.allclose(first[0], first[1], atol=1e-3)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
