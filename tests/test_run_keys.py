"""One run has one key, whoever asks: the command, the notebook, a grid, the workflow, and a repetition from its record."""
import functools
import itertools
import shlex
from types import SimpleNamespace

import nbformat
import pytest
import torch
import yaml
from conftest import ROOT, save_sample_folder
from PIL import Image

from sortkd.fronts.commands import run
from sortkd.train.images import ImageData, load_data
from sortkd.train.cifar import has_cifar100
from sortkd.train.image_files import load_image_folder
from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.grid import read_grid
from sortkd.experiment.slices import experiments_of
from sortkd.experiment.parameters import read_parameters
from sortkd.experiment.pairs import IMAGENET_PAIRS
from sortkd.experiment.record import plain
from sortkd.experiment.repeat import prepare_repetition
from sortkd.experiment.one_run import prepare_run

NOTEBOOK = nbformat.read(ROOT / "nbs" / "run_experiment.ipynb", 4)
CELL, = [cell.source for cell in NOTEBOOK.cells if "parameters" in cell.metadata.get("tags", [])]
SNAKEFILE = (ROOT / "workflow" / "Snakefile").read_text()
TEACHER = {"architecture": "any", "source": "found", "file": "t.safetensors", "weights_sha256": "0" * 64, "training": {}, "top1": 50.0}
PAIRS = ["r56_r20", "wrn40_2_shuv1", "resnet20:resnet8", "resnet8:ShuffleV2"]  # the papers', with other numbers, and own
METHODS = ["ce", "kd+sort", "dkd", "ctkd(start=2)", "lskd_mlkd+swap", "rld", "sld"]
IMAGENET = {"pairs": [*IMAGENET_PAIRS], "methods": ["ce", "kd+sort", "dkd"]}
CASES = [  # preset, data, options
    ("quick", "digits", {}), ("quick", "digits", {"epochs": 3, "recipe": "lr=0.01,batch_size=32"}), ("quick", "digits", {"train_size": 90, "cache": "off"}),
    ("quick", "digits(train=0:500,held_out=500:900)", {"precision": "float32"}), ("quick", "digits(train=0:30)", {}),
    ("quick", "folder", {}), ("short", "squares", {"compile": True}), ("paper", "squares", {}), ("paper", "folder", {"epochs": 24}),
    ("quick", "cifar100-mini", {}), ("quick", "auto", {"epochs": 2}), ("quick", "cifar100", {}), ("short", "auto", {}), ("short", "cifar100", {"epochs": 7}),
    ("paper", "cifar100", {}), ("paper", "auto", {"epochs": 60}), ("paper", "cifar100(train=0:5000)", {"deterministic": True}),
    ("quick", "imagenet", {}), ("paper", "imagenet", {}), ("paper", "imagenet", {"epochs": 10})]

read = functools.cache(load_data)
subset = functools.cache(ImageData.subset)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Images in files of many sizes, and in files of one small size, which are read into memory."
    root = tmp_path_factory.mktemp("images")
    for path in save_sample_folder(root / "folder").rglob("*.JPEG"):
        small = root / "squares" / path.relative_to(root / "folder")
        small.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((32, 32)).save(small)
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch, folders):
    "Images are read once, and no network is built to see whether it takes them; what is compared depends on neither."
    def load(name):
        return load_image_folder(folders / "folder") if name == "imagenet" else read(name)

    monkeypatch.setattr("sortkd.experiment.setup.load_data", load)
    monkeypatch.setattr("sortkd.experiment.setup.check_takes", lambda *_: None)
    monkeypatch.setattr("sortkd.experiment.repeat.check_record", lambda record: record)  # of a run that has not been made
    monkeypatch.setattr(ImageData, "subset", lambda self, **sizes: subset(self, **sizes))


class Planned(Exception): ...


def by_command(arguments, monkeypatch):
    def stop(experiment, *_, **__):
        raise Planned(experiment)

    with monkeypatch.context() as patch:
        patch.setattr("sortkd.experiment.run.run_experiment", stop)
        patch.setattr(torch, "set_num_threads", lambda _: None)
        with pytest.raises(Planned) as planned:
            run([str(each) for each in arguments])
    return planned.value.args[0]


def by_notebook(parameters):
    variables = {}
    exec(CELL, variables)
    return prepare_experiment(**read_parameters(variables | parameters, {"__builtins__"}))


def by_workflow(grid, cell, monkeypatch):
    source = SNAKEFILE[SNAKEFILE.index("def arguments(wildcards)"):SNAKEFILE.index("wildcard_constraints:")]
    functions = {"KIND": "command", "SHARED": grid.shared, "shlex": shlex}
    exec(source, functions)
    wildcards = SimpleNamespace(pair=cell.pair, method=cell.method, seed=cell.seed)
    return by_command(shlex.split(functions["arguments"](wildcards)), monkeypatch)


def runs_of(experiment, method, seed):
    about = TEACHER | {"architecture": experiment.pair.teacher}
    kind = "computed" if experiment.cache == "off" else "cached"
    return prepare_run(experiment, next(each for each in experiment.methods if each.name == method), seed, kind, about)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number])).replace("/", "-"))
def test_every_way_leads_to_the_same_run(number, folders, tmp_path, monkeypatch, capsys):
    preset, name, options = CASES[number]
    if not has_cifar100() and (name.startswith("cifar100") or name == "auto"):
        pytest.skip("needs CIFAR-100")
    data = f"folder:{folders / name}" if name in ("folder", "squares") else "auto" if name == "imagenet" else name
    chosen = IMAGENET if name == "imagenet" else {"pairs": PAIRS, "methods": METHODS[:4] if name == "folder" else METHODS}
    shared = {"dataset": data, **options, "device": "cpu"}
    places = {place: str(tmp_path / place) for place in ("results_dir", "teachers_dir")}
    settings = {**chosen, "seeds": "1-2", "preset": preset, "options": shared, "cells_dir": str(tmp_path), **places, "cell": "command"}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(settings))
    grid = read_grid(tmp_path / "grid.yaml")
    by_grid = experiments_of(grid)
    cells = [*grid.cells[grid.cells["seed"] == 2].itertuples()]
    assert len({runs_of(by_grid[cell.pair], cell.method, 2).folder for cell in cells}) == len(cells)
    for place, cell in enumerate(cells[number % 5::5]):  # all of them, over the cases
        parameters = {"pair": cell.pair, "methods": cell.method, "seeds": str(cell.seed), "preset": preset, **shared, **places}
        wanted = runs_of(by_grid[cell.pair], cell.method, 2)
        record = plain({**wanted.facts, "machine": {"threads": torch.get_num_threads()}})
        where = {"dataset": data} if data.startswith("folder:") else {}
        ways = {"notebook": by_notebook(parameters), "repetition": prepare_repetition(record, **where, **places)}
        if place == 0:  # it prints, and is the slowest
            given = [(f"--{key.replace('_', '-')}", *([] if value is True else [value])) for key, value in parameters.items()]
            ways |= {"command": by_command([*itertools.chain(*given)], monkeypatch), "workflow": by_workflow(grid, cell, monkeypatch)}
        for way, experiment in ways.items():
            found = runs_of(experiment, cell.method, 2)
            assert found.facts == wanted.facts, way
            assert found.folder == wanted.folder, way
