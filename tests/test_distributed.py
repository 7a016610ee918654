"Processes that share every batch compute what one process computes, and write what it writes."
import json
import os
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import context
from safetensors.torch import load_file, save_file
from torch import nn

from sortkd.experiment.pairs import PRESETS
from sortkd.experiment.storage import read_records
from sortkd.fronts.commands import run
from sortkd.methods import create_method
from sortkd.train.devices import create_fabric
from sortkd.train.augmentation import Batches
from sortkd.train.images import load_digits
from sortkd.train.trainer import Recipe, evaluate, train

METHODS = ("kd+sort", "dist+sort", "mlkd+sort", "ctkd")
IMAGES, TEST_IMAGES, EPOCHS = 130, 61, 2  # one of three processes has no part in the last batch


def create_network(seed: int) -> nn.Module:
    "Small, with BatchNorm: what processes have to say to each other is what takes time."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.Conv2d(16, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def short_run(name: str, fabric, checkpoint: Path, callbacks=()):
    "The outcome of a method; the gradients of `dist` are large."
    batches = Batches(load_digits().subset(train_size=IMAGES, test_size=TEST_IMAGES))
    method = create_method(name, **({"kd_weight": 0.02} if "dist" in name else {}))
    return train(create_network(1), batches, method, Recipe(lr=0.005).shortened(EPOCHS), fabric,
                 seed=2, teacher=create_network(0), checkpoint=checkpoint, callbacks=callbacks)


def run_all(folder: Path) -> None:
    torch.set_num_threads(1)
    fabric, curves = create_fabric("cpu", "float32"), {}
    for name in METHODS:
        rows = curves[name] = []
        weights = short_run(name, fabric, folder / f"{name}.pt", [rows.append]).last_weights
        if fabric.is_global_zero:
            weights = {key: value.contiguous() for key, value in weights.items()}
            save_file(weights, folder / f"{name}.safetensors")
    batches = Batches(load_digits().subset(train_size=IMAGES, test_size=TEST_IMAGES))
    found = evaluate(create_network(0), batches, fabric)
    curves["evaluation"] = found._asdict() | {"correct": found.correct.tolist()}
    if fabric.is_global_zero:
        (folder / "curves.json").write_text(json.dumps(curves))
    else:
        assert not any(curves[name] for name in METHODS), "callbacks belong to the first process"


def _run_rank(index: int, processes: int, port: int, work, arguments: tuple) -> None:
    "What torchrun tells each of its processes, and then `work`."
    told = {"RANK": index, "LOCAL_RANK": index, "GROUP_RANK": 0, "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in told.items()})
    work(*arguments)


def run_forked(processes: int, work, *arguments) -> None:
    "`work` in several processes without torchrun; forked, they have everything imported."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [context.Process(target=_run_rank, args=(index, processes, port, work, arguments))
               for index in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    assert [process.exitcode for process in started] == [0] * processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same runs in one process and in three: (curves, folder) of each."
    found = {}
    for processes in (1, 3):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        run_forked(processes, run_all, folder)
        found[processes] = json.loads((folder / "curves.json").read_text()), folder
    return found


@pytest.mark.parametrize("method", METHODS)
def test_ranks_compute_what_one_process_computes(runs, method):
    (alone, folder), (together, other_folder) = runs[1], runs[3]
    assert len(alone[method]) == len(together[method]) == EPOCHS
    for expected, row in zip(alone[method], together[method]):
        assert row.keys() == expected.keys()
        for name in ("train_loss", "test_loss", "temperature"):
            if name in expected:  # after three steps, ReLUs decide on rounding
                tolerance = 5e-5 if row["epoch"] == 1 else 5e-3
                assert row[name] == pytest.approx(expected[name], rel=tolerance), name
        for name in ("epoch", "lr", "teacher_wrong_rows", "changed_rows"):
            assert row.get(name) == expected.get(name), name  # counted once, over all rows
        for name, images in (("train_top1", IMAGES), ("test_top1", TEST_IMAGES)):
            assert abs(row[name] - expected[name]) <= 100 / images + 1e-9  # one row
    weights, others = (load_file(each / f"{method}.safetensors") for each in (folder, other_folder))
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=2e-2, atol=5e-3)


def test_evaluation_counts_every_image_once(runs):
    alone, together = (runs[processes][0]["evaluation"] for processes in (1, 3))
    assert together["images"] == alone["images"] == TEST_IMAGES
    assert together["correct"] == alone["correct"] and together["top1"] == alone["top1"]
    assert sum(alone["correct"]) == round(alone["top1"] * TEST_IMAGES / 100)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_checkpoint_of_three_processes_is_read_by_one(runs, tmp_path):
    "A run's settings matter to it; how many processes share a batch is not one of them."
    curves, folder = runs[3]
    for method in METHODS:
        assert (folder / f"{method}.pt").exists()
    os.symlink(folder / "ctkd.pt", tmp_path / "ctkd.pt")
    outcome = short_run("ctkd", create_fabric("cpu", "float32"), tmp_path / "ctkd.pt")
    assert outcome.curve == curves["ctkd"]


def command(folder: Path, options: list[str]) -> None:
    "`sortkd-run` in a folder, with a teacher that is trained for three steps; its output is kept."
    torch.set_num_threads(1)
    quick = PRESETS["quick", "digits"]
    PRESETS["quick", "digits"] = replace(
        quick, teacher_train_size=67, teacher_recipe=quick.teacher_recipe.shortened(1))
    os.chdir(folder)
    with open(f"said-{os.environ['RANK']}", "w") as file, redirect_stdout(file):
        assert run(options) == 0


def by_torchrun(folder: Path, options: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", "--no-python", "sortkd-run", *options],
                          capture_output=True, text=True, timeout=300, cwd=folder,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "said-0").write_text(done.stdout)


@pytest.mark.parametrize("launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_an_experiment_of_two_processes_is_recorded_once(tmp_path, launcher, monkeypatch):
    "The teacher is trained, kept and read, and each run has one record."
    options = ("--pair resnet20:resnet8 --preset quick --dataset digits --epochs 1 --train-size 67 "
               "--test-size 31 --methods kd,kd+sort --device cpu --precision float32").split()
    if launcher == "torchrun":
        by_torchrun(tmp_path, options)
    else:
        run_forked(2, command, tmp_path, options)
    said = "".join(path.read_text() for path in tmp_path.glob("said-*"))
    assert said.count("records appended to") == 1 and said.count("This is a quick run") == 1
    records = read_records(tmp_path / "results" / "quick.jsonl")
    assert [(each["method"]["name"], each["processes"]) for each in records] == [
        ("kd", 2), ("kd+sort", 2)]
    teacher, = (tmp_path / "teachers" / "local").glob("*.safetensors")
    assert len(list((tmp_path / "results" / "runs").glob("*/*/last.safetensors"))) == 2
    monkeypatch.chdir(tmp_path)
    assert run([*options, "--teacher", str(teacher), "--results-dir", "alone", "--quiet"]) == 0
    for ours, record in zip(read_records(tmp_path / "alone" / "quick.jsonl"), records):
        losses = (each["curve"]["train_loss"] for each in (record, ours))
        assert next(losses) == pytest.approx(next(losses), rel=1e-2)
        for each in ("about_teacher", "weights_sha256"), ("result", "changed_rows"):
            assert record[each[0]][each[1]] == ours[each[0]][each[1]]
