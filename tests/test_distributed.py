"Two processes that share every batch compute what one process computes, and write what one process writes."
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

from sortkd.fronts.commands import run
from sortkd.train.augmentation import Batches
from sortkd.train.images import load_digits
from sortkd.train.devices import Ranks, SumOverRanks, SynchronizedBatchNorm, create_fabric
from sortkd.experiment.setup import prepare_experiment
from sortkd.methods import create_method
from sortkd.experiment.pairs import PRESETS
from sortkd.experiment.storage import read_records
from sortkd.train.trainer import Recipe, evaluate, train

METHODS = ("kd+sort", "dist+sort", "mlkd+sort", "ctkd")
IMAGES, TEST_IMAGES, EPOCHS = 130, 61, 2  # in batches of 64: of three processes one has no part in the last batch


def create_network(seed: int) -> nn.Module:
    "Small, with BatchNorm: what processes have to say to each other is what takes time."
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )


def run_all(folder: Path) -> None:
    "A short run of each method."
    torch.set_num_threads(1)
    fabric = create_fabric("cpu", "float32")
    batches, recipe = Batches(load_digits().subset(train_size=IMAGES, test_size=TEST_IMAGES)), Recipe(lr=0.005).shortened(EPOCHS)

    def network(seed):
        network = create_network(seed)
        for module in network.modules():  # one process alone, too: PyTorch's own rounds more coarsely in channels-last memory
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SynchronizedBatchNorm
        return network

    if fabric.world_size == 1:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    teacher, curves = network(0), {}
    for name in METHODS:
        rows = []
        method = create_method(name, **({"kd_weight": 0.02} if "dist" in name else {}))  # its gradients are large
        outcome = train(network(1), batches, method, recipe, fabric, teacher=teacher, seed=2, callbacks=[rows.append],
                        checkpoint=folder / f"{name}.pt", checkpoint_seconds=0)
        curves[name] = rows
        if fabric.is_global_zero:
            save_file({key: value.contiguous() for key, value in outcome.last_weights.items()}, folder / f"{name}.safetensors")
    found = evaluate(teacher, batches, fabric)
    curves["evaluation"] = vars(found) | {"correct": found.correct.tolist()}
    if fabric.world_size > 1:
        with pytest.raises(ValueError, match="workers is 2"):
            prepare_experiment(pair="r56_r20", methods="kd", dataset="digits", preset="quick", device="cpu", workers=2)
    if not fabric.is_global_zero:
        assert not any(curves[name] for name in METHODS), "callbacks belong to the first process"
        return
    (folder / "curves.json").write_text(json.dumps(curves))


def _run_rank(index: int, processes: int, port: int, work, arguments: tuple) -> None:
    "What torchrun tells each of its processes, and then `work`."
    told = {"RANK": index, "LOCAL_RANK": index, "GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in told.items()})
    work(*arguments)


def run_forked(processes: int, work, *arguments) -> None:
    "`work` in several processes, without torchrun: a forked process has everything imported, which saves most of the time."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [context.Process(target=_run_rank, args=(index, processes, port, work, arguments)) for index in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    assert [process.exitcode for process in started] == [0] * processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same runs in one process and in three."
    folders = {}
    for processes in (1, 3):
        folders[processes] = tmp_path_factory.mktemp(f"processes{processes}")
        run_forked(processes, run_all, folders[processes])
    return {processes: (json.loads((folder / "curves.json").read_text()), folder) for processes, folder in folders.items()}


@pytest.mark.parametrize("method", METHODS)
def test_ranks_compute_what_one_process_computes(runs, method):
    (alone, folder), (together, other_folder) = runs[1], runs[3]
    assert len(alone[method]) == len(together[method]) == EPOCHS
    for expected, row in zip(alone[method], together[method]):
        assert row.keys() == expected.keys()
        for name in ("train_loss", "test_loss", "temperature"):
            if name in expected:
                tolerance = 5e-5 if row["epoch"] == 1 else 5e-3  # three steps; after them ReLUs decide on rounding
                assert row[name] == pytest.approx(expected[name], rel=tolerance), name
        for name in ("epoch", "lr", "teacher_wrong_rows", "changed_rows"):
            assert row.get(name) == expected.get(name), name  # counted once, over all rows
        for name, images in (("train_top1", IMAGES), ("test_top1", TEST_IMAGES)):
            assert abs(row[name] - expected[name]) <= 100 / images + 1e-9  # rounding may decide a row
    weights, others = (load_file(each / f"{method}.safetensors") for each in (folder, other_folder))
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=2e-2, atol=5e-3)


def test_evaluation_counts_every_image_once(runs):
    alone, together = (runs[processes][0]["evaluation"] for processes in (1, 3))
    assert together["images"] == alone["images"] == TEST_IMAGES and together["top1"] == alone["top1"]
    assert together["correct"] == alone["correct"] and sum(alone["correct"]) == round(alone["top1"] * TEST_IMAGES / 100)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_checkpoint_of_three_processes_is_read_by_one(runs, tmp_path):
    "What matters to a run is its settings, and how many processes share a batch is none of them."
    for method in METHODS:
        assert (runs[3][1] / f"{method}.pt").exists()
    curves = runs[3][0]
    os.symlink(runs[3][1] / "ctkd.pt", tmp_path / "ctkd.pt")
    outcome = train(create_network(1), Batches(load_digits().subset(train_size=IMAGES, test_size=TEST_IMAGES)), create_method("ctkd"),
                    Recipe(lr=0.005).shortened(EPOCHS), create_fabric("cpu", "float32"), teacher=create_network(0), seed=2, checkpoint=tmp_path / "ctkd.pt")
    assert outcome.curve == curves["ctkd"]


def test_synchronized_batch_norm_is_batch_norm(monkeypatch):
    monkeypatch.setattr(SumOverRanks, "apply", lambda values: values)  # of one process
    generator = torch.Generator().manual_seed(0)
    plain, ours = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    nn.init.uniform_(plain.weight, 0.5, 1.5), nn.init.normal_(plain.bias)
    ours.load_state_dict(plain.state_dict())
    ours.__class__ = SynchronizedBatchNorm
    for _ in range(3):
        images = (2 + torch.randn(6, 5, 4, 4, generator=generator)).requires_grad_()
        twin = images.detach().clone().requires_grad_()
        weights = torch.randn(6, 5, 4, 4, generator=generator)
        expected, values = plain(images), ours(twin)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
        for gradient, golden in zip(torch.autograd.grad((values * weights).sum(), (twin, *ours.parameters())),
                                    torch.autograd.grad((expected * weights).sum(), (images, *plain.parameters()))):
            torch.testing.assert_close(gradient, golden, rtol=1e-4, atol=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    assert torch.equal(ours.eval()(images), plain.load_state_dict(ours.state_dict()) and plain.eval()(images))


def command(folder: Path, options: list[str]) -> None:
    "`sortkd-run` in a folder, with a teacher that is trained for three steps; what it says is kept."
    torch.set_num_threads(1)
    quick = PRESETS["quick", "digits"]
    PRESETS["quick", "digits"] = replace(quick, teacher_train_size=67, teacher_recipe=quick.teacher_recipe.shortened(1))
    os.chdir(folder)
    with open(f"said-{os.environ['RANK']}", "w") as file, redirect_stdout(file):
        assert run(options) == 0


def by_torchrun(folder: Path, options: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "sortkd-run", *options],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "said-0").write_text(done.stdout)


@pytest.mark.parametrize("launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_an_experiment_of_two_processes_is_recorded_once(tmp_path, launcher, monkeypatch):
    "The teacher is trained, kept and read, and each run has one record."
    options = ["--pair", "resnet20:resnet8", "--preset", "quick", "--dataset", "digits", "--epochs", "1", "--train-size", "67", "--test-size", "31",
               "--methods", "kd,kd+sort", "--device", "cpu", "--precision", "float32"]
    if launcher == "torchrun":
        by_torchrun(tmp_path, options)
    else:
        run_forked(2, command, tmp_path, options)
    said = "".join(path.read_text() for path in tmp_path.glob("said-*"))
    assert said.count("records appended to") == 1 and said.count("This is a quick run") == 1
    records = read_records(tmp_path / "results" / "quick.jsonl")
    assert [record["method"]["name"] for record in records] == ["kd", "kd+sort"] and all(record["processes"] == 2 for record in records)
    teacher, = (tmp_path / "teachers" / "local").glob("*.safetensors")
    assert len(list((tmp_path / "results" / "runs").glob("*/*/last.safetensors"))) == 2

    monkeypatch.chdir(tmp_path)
    assert run([*options, "--teacher", str(teacher), "--results-dir", "alone", "--quiet"]) == 0
    for ours, record in zip(read_records(tmp_path / "alone" / "quick.jsonl"), records):
        assert record["curve"]["train_loss"] == pytest.approx(ours["curve"]["train_loss"], rel=1e-2)
        assert record["about_teacher"]["weights_sha256"] == ours["about_teacher"]["weights_sha256"]
        assert record["result"]["changed_rows"] == ours["result"]["changed_rows"]


@pytest.mark.parametrize("count,rows", [(1, 5), (2, 5), (3, 2), (4, 64)])
def test_parts_cover_all_rows(count, rows):
    class Stub:
        device, world_size = None, count

    parts = []
    for index in range(count):
        Stub.global_rank = index
        parts.append(Ranks(Stub).part(rows))
    assert parts[0][0] == 0 and parts[-1][1] == rows and all(left[1] == right[0] for left, right in zip(parts, parts[1:]))
    assert [stop - start for start, stop in parts] == [len(part) for part in torch.arange(rows).tensor_split(count)]
