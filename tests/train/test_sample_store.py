"""What a run of many samples draws, and what of it is missing."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from adaptok.train.sample_plan import SamplePlan
from adaptok.train.sample_store import SampleStore, name_part


def make_plan(**options):
    values = {"model": "m", "weights": "", "count": 5000, "seed": 5, "labels": (0,), "steps": 2,
              "scheduler": "dpm", "height": 4, "width": 4}  # fmt: skip
    return SamplePlan(**(values | options))


class TestPlan:
    @given(st.integers(1, 5000), st.integers(1, 30))
    def test_balanced_classes(self, count, classes):
        plan = make_plan(count=count, labels=tuple(range(100, 100 + classes)))
        counts = Counter(plan.label(number) for number in range(count))
        sizes = [counts[label] for label in plan.labels]
        assert sum(sizes) == count
        assert max(sizes) - min(sizes) <= 1

    def test_drawn_classes(self):
        plan = make_plan(labels=tuple(range(10)), classes="drawn")
        drawn = [plan.label(number) for number in range(5000)]
        counts = Counter(drawn)
        assert sorted(counts) == list(range(10))
        # five standard deviations of a binomial count
        assert all(abs(counts[label] - 500) < 5 * 21.3 for label in range(10))
        assert len(set(counts.values())) > 1
        assert drawn[4321] == plan.label(4321)  # the number alone
        other = plan.model_copy(update={"seed": 6})
        assert sum(other.label(n) == label for n, label in enumerate(drawn)) < 700
        assert drawn[:20] != (drawn[10:30])

    @given(st.integers(0, 50), st.integers(0, 999_999))
    def test_no_two_samples_share_their_noise(self, seed, number):
        plan, later = make_plan(seed=seed), make_plan(seed=seed + 1)
        assert plan.noise_seed(number) < plan.noise_seed(number + 1) <= later.noise_seed(0)


class TestMissing:
    @settings(max_examples=50, deadline=None)  # it writes files
    @given(st.sets(st.integers(0, 29), max_size=30), st.integers(1, 9))
    def test_batches_fill_the_gaps(self, tmp_path_factory, drawn, batch):
        store = SampleStore(tmp_path_factory.mktemp("s") / "x.npz", make_plan(count=30))
        store.folder.mkdir()
        for number in drawn:
            name = name_part(range(number, number + 1))
            (store.folder / name).touch()
        missing = store.list_missing(batch)
        numbers = [number for part in missing for number in part]
        assert numbers == sorted(set(range(30)) - drawn)
        assert all(part and len(part) <= batch for part in missing)
        # whole batches are those of an unbroken run
        assert all(part.start // batch == (part.stop - 1) // batch for part in missing)
