"""`adaptok plan`."""

import json

import pytest
import torch

from adaptok.budgets import Budget
from adaptok.cli import benching, planning
from adaptok.cli.planning import PlanRow, list_losses, write_plan
from adaptok.errors import ConfigError
from adaptok.measure.planner import Plan
from adaptok.measure.turns import StageCost
from adaptok.time_curves import CallShape, CurvePoint, TimeCurve

VIT = "test_vit"  # timm's smallest: patches of 16 pixels
SHAPE = CallShape(8, 100, "float32", "cpu", 2)
CURVE = TimeCurve(SHAPE, (CurvePoint(0.1, 20.0, 0.02), CurvePoint(1.0, 80.0, 0.05)))


@pytest.fixture
def plan(run):
    def call(*arguments):
        return run(
            "plan", "--repeats", 1, "--points", 2, "--device", "cpu", "--batch", 2, *arguments
        )

    return call


class TestCommand:
    def test_answer_and_table(self, plan, tmp_path):
        done = plan(VIT, "--size", 64, "--target-ms", 60_000, "--json", tmp_path / "plan.json")
        assert done.exit_code == 0, done.output
        assert "the full budget meets 60000 ms already: keep=1 runs in" in done.stdout
        for word in ("plain model", "GFLOPs", "batch 2 of 16 cells, float32 on cpu", "plan.json"):
            assert word in done.stdout, word
        content = json.loads((tmp_path / "plan.json").read_text())
        assert (content["target_ms"], content["keep"]) == (60_000, 1.0)
        assert (content["shape"]["batch"], content["shape"]["num_cells"]) == (2, 16)
        assert [stage["name"] for stage in content["stages"]] == ["dc"]

    def test_json_for_machines(self, plan):
        threads = torch.get_num_threads()
        done = plan(
            VIT, "--size", 64, "--keep", 0.5, "--json", "-", "--router", "norm",
            "--dtype", "bfloat16", "--threads", 2,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        content = json.loads(done.stdout)
        assert (content["version"], content["model"], content["keep"]) == (1, VIT, 0.5)
        assert (content["shape"]["dtype"], content["shape"]["threads"]) == ("bfloat16", 2)
        assert content["expected_ms"] > 0
        assert torch.get_num_threads() == threads
        rows = {row["name"]: row for row in content["rows"]}
        assert rows["keep=0.5"]["tokens"] == 8
        # operations come with their time, and fewer cells take fewer
        assert all(row["ms"] > 0 for row in rows.values())
        assert rows["keep=0.5"]["gflops"] < 0.7 * rows["plain model"]["gflops"]
        assert rows["plain model"]["gflops"] < rows["keep=1"]["gflops"]

    def test_of_a_dcdit(self, plan, model_folder):
        done = plan(model_folder, "--size", 8, "--keep", 0.25)
        assert done.exit_code == 0, done.output
        assert "keep=0.25 runs in" in done.stdout
        assert "there is no plain model to compare with" in done.stdout
        assert "does not pay" not in done.stdout
        assert "batch 2 of 64 cells" in done.stdout

    def test_compiled(self, plan, monkeypatch):
        asked = []
        monkeypatch.setattr(planning, "compile_adaptive", asked.append)
        assert plan(VIT, "--size", 64, "--json", "-").exit_code == 0
        assert not asked
        assert plan(VIT, "--size", 64, "--json", "-", "--compile").exit_code == 0
        assert len(asked) == 1

    def test_help(self, run):
        done = run("plan", "--help")
        for word in ("--target-ms", "--keep", "--batch", "--json", "--compile"):
            assert word in done.stdout, word


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'?"),
            ([VIT, "--target-ms", "0"], "--target-ms is a finite number above 0, got 0"),
            ([VIT, "--target-ms", "nan"], "--target-ms is a finite number above 0, got nan"),
            ([VIT, "--keep", "1.5"], "keep is a fraction in (0, 1], got 1.5"),
            ([VIT, "--keep", "0.5", "--target-ms", "9"], "exclude each other"),
            ([VIT, "--dtype", "int8"], "--dtype is one of float32"),
            ([VIT, "--device", "toaster"], "there is no device 'toaster'"),
            ([VIT, "--size", "64", "--target-ms", "1e-6"], "is out of reach here: the fastest"),
            ([VIT, "--size", "50"], "does not run with --size 50: Input height (50) should be"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_one_sentence(self, plan, arguments, message):
        done = plan(*arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_missing_package_is_one_sentence(self, plan, monkeypatch):
        def fail(*args, **kwargs):
            raise ModuleNotFoundError("No module named 'flash'")

        monkeypatch.setattr(planning, "plan_budget", fail)
        done = plan(VIT, "--size", 64)
        assert done.exit_code == 2
        assert "needs a package that is missing here: No module named 'flash'" in done.stderr

    def test_a_fault_of_our_own_is_not_hidden(self, plan, monkeypatch):
        def fail(*args, **kwargs):
            raise KeyError("a fault")

        monkeypatch.setattr(planning, "plan_budget", fail)
        assert isinstance(plan(VIT, "--size", 64).exception, KeyError)


def rows_of(found):
    return [
        PlanRow("plain model", 1.0, 100, found.plain.ms, 0.1, 10.0),
        PlanRow("keep=1", 1.0, 100, 80.0, 0.05, 10.5),
    ]


class TestWords:
    def test_a_budget_that_pays(self):
        stage = StageCost("dc", 12.3, 0.5)
        found = Plan(CURVE, CurvePoint(1.0, 74.0), 41.8, Budget(keep=0.42), (stage,), 7, "cpu")
        lines = write_plan(found, rows_of(found))
        assert lines[0].startswith("keep=0.42 runs in 41.3 ms (plain 74.0 ms); below keep=0.91")
        assert lines[3].split() == ["plain", "model", "100", "74", "10%", "10", "1.00", "1.00"]
        assert lines[4].split() == ["keep=1", "100", "80", "5%", "10.5", "1.08", "1.05"]
        assert "dc saves 12.3 ms." in lines
        assert not any("does not pay" in line for line in lines)

    def test_a_stage_and_a_budget_that_lose(self):
        stages = (StageCost("outer", 3.0, 0.5), StageCost("dc", -30.0, 0.5))
        found = Plan(CURVE, CurvePoint(1.0, 30.0), None, Budget(keep=0.4), stages, 7, "cpu")
        lines = write_plan(found, rows_of(found))
        assert "dc costs 30.0 ms." in lines
        assert list_losses(found) == [
            "dc does not pay here: in Python, Plan.apply(model) lets it step aside.",
            "keep=0.4 does not pay here: it takes 40.0 ms, and the plain model 30.0 ms.",
        ]
        assert lines[-2:] == list_losses(found)

    def test_no_budget_that_pays(self):
        found = Plan(CURVE, CurvePoint(1.0, 10.0))
        assert list_losses(found) == ["No budget pays here: run the plain model."]
        assert list_losses(Plan(CURVE, None)) == []


class TestSizes:
    def test_what_a_host_says_to_a_size_is_one_sentence(self):
        refused = pytest.raises(ConfigError, match=r"--size 50: too \[small\]$")
        with refused, benching.naming_size(50):
            raise RuntimeError("too [small]\nand more")

    @pytest.mark.parametrize("error", [KeyError("k"), torch.OutOfMemoryError("full")])
    def test_other_faults_pass(self, error):
        with pytest.raises(type(error)), benching.naming_size(50):
            raise error
