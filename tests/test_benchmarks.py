"The benchmarks compare like with like, and run."
import json
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

from sortkd.train.images import load_digits
from sortkd.methods import create_method
from sortkd.train.networks import create_model
from sortkd.sorting import sort_logits
from sortkd.train.trainer import Recipe

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_first  # noqa: E402
import speed  # noqa: E402
import tokens  # noqa: E402
import usual_way  # noqa: E402


@pytest.mark.parametrize("shape", [(1, 2), (64, 10), (64, 100), (50, 1000)])
def test_the_usual_way_computes_the_same(shape):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *shape, generator=generator)
    teacher = (teacher * 4).round() / 4  # with ties
    target = torch.randint(shape[1], shape[:1], generator=generator)
    assert torch.equal(usual_way.two_full_sorts(teacher, target), sort_logits(teacher, target))
    method = create_method("kd+sort")
    ours = method.loss(student, method.repair_logits(teacher, target), target, 1)
    torch.testing.assert_close(usual_way.kd_sort_loss(student, teacher, target), ours)


def test_the_usual_way_learns():
    data = load_digits().subset(train_size=400, test_size=100)
    torch.manual_seed(0)
    teacher, student = create_model("resnet8", 10), create_model("resnet8", 10)
    curve = usual_way.train(student, teacher, data, Recipe(lr=0.1).shortened(3))
    assert len(curve) == 3 and curve[-1] > 20
    images, _ = next(iter(usual_way.loaders(data, 32, workers=0)[0]))
    assert images.shape == (32, 3, 16, 16) and images.dtype == torch.float32


def test_sorting_is_faster_than_two_full_sorts():
    "Generous, for busy machines; results/measurements/benchmarks.jsonl has the measured times."
    (large,) = speed.measure_sorting([(512, 1000)], 5, "cpu")
    assert min(large["ms"]["two full sorts"]) > 8 * min(large["ms"]["sort_logits"])


def test_students_of_one_seed_are_timed_in_three_ways(monkeypatch):
    monkeypatch.setattr(speed, "has_cifar100", lambda: False)
    row = speed.measure_students("resnet8:resnet8", 64, 2, 1, "cpu")
    assert list(row["ms"]) == ["one after the other", "together", "steps and evaluation alone"]
    profile = speed.measure_profile("resnet8:resnet8", 64, 1, "cpu")["ms"]
    assert list(profile) == [*speed.PROFILE, "the rest"]
    assert all(times[0] > 0 for times in (*row["ms"].values(), *profile.values()))


@pytest.mark.slow
def test_the_script_runs_and_records(tmp_path):
    file = tmp_path / "benchmarks.jsonl"

    def run(*arguments):
        command = [sys.executable, BENCHMARKS / "speed.py", "--device", "cpu", "--results", file]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run("--quick", "--only", "epoch", "--pair", "resnet20:resnet8")
    assert "ours, float32, logits cached" in said and not file.exists()
    run("--only", "sorting", "--repetitions", "2")
    record, = map(json.loads, file.read_text().splitlines())
    shapes = (*speed.SORT_SHAPES, *speed.SORT_SHAPES[:4])
    assert [row["setting"] for row in record["rows"]] == list(map(str, shapes))
    assert all(len(times) == 2 for row in record["rows"] for times in row["ms"].values())


def test_tokens_with_sorting_stand_beside_the_same_without(capsys):
    rows = tokens.measure([(16, 500, 4)], [(16, 500, 4)], 1, "cpu")
    rows += tokens.measure_lists(64, [50], 1, "cpu") + tokens.measure_sorting(16, 500, 1, "cpu")
    tokens.print_rows(rows)
    ways = [["KL", "KL with sorting"]] * 2 + [["descending", "in any order"], ["sort_logits", "a copy"]]
    assert [list(row["ms"]) for row in rows] == ways
    assert rows[0]["extra_bytes"]["KL"] > 4 * 500 * 4  # a chunk in float32 is held at least
    assert capsys.readouterr().out.count("of the logits") == 6


def test_what_runs_first_on_a_gpu_is_rehearsed(monkeypatch, tmp_path):
    file, parts = tmp_path / "found.json", ("sorting", "steps", "same_bits")
    monkeypatch.setitem(gpu_first.PARTS, "steps", Mock(side_effect=RuntimeError("no such kernel")))
    monkeypatch.setattr(sys, "argv", ["", "--cpu", "--parts", *parts, "--output", str(file)])
    assert gpu_first.main() == 1
    found = json.loads(file.read_text())
    assert found["sorting"] == {"wrong": []} and found["machine"]["cores"]
    assert found["same_bits"] == {"captured equals eager": True, "twice": True}
    assert found["steps"] == {"failed": "RuntimeError: no such kernel"}


@pytest.mark.slow
def test_all_of_what_runs_first_on_a_gpu_is_rehearsed(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_first.py"), "--cpu", "--parts"]
    done = subprocess.run([*command, "steps", "students_at_once", "epoch", "profile"],
                          capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu_first.json").read_text())
    assert found["epoch"]["kd, kd+sort"]["captured"] is False and found["profile"]["kernels"] > 0
