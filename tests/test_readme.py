"Each line of README's \"What next\" runs as it stands, in a folder outside the clone."
import re
import shlex
from glob import glob
from importlib.metadata import entry_points
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, seeded_network
from PIL import Image
from torch import nn

import sortkd
from sortkd.evidence.statistics import compare
from sortkd.methods import REPAIRS
from sortkd.tokens import LinearDistillationLoss
from sortkd.train.teachers import load_teacher, save_teacher

README = (ROOT / "README.md").read_text()
NEXT = README.partition("## What next")[2].partition("\n## ")[0]
LINES = re.findall(r"(?m)^\|.*\| `([^`]+)` \|$", NEXT)
COMMANDS = [each for each in LINES if each.startswith("sortkd-")]
WORKFLOW = [each for each in LINES if each.startswith("snakemake")]  # tests/test_workflow.py
PYTHON = [each for each in LINES if each not in (*COMMANDS, *WORKFLOW)]
SMALL = ["--epochs=1", "--seeds=0", "--quiet", "--device=cpu"]

PLUGIN = """
from sortkd.experiment.plugins import register_repair

@register_repair("mine")
def halve(teacher_logits, target):
    return teacher_logits / 2
"""
GRID = """
pairs: [resnet20:resnet8]
methods: [kd, kd+sort]
seeds: 1
preset: quick
options: {dataset: 'folder:birds', epochs: 1}
"""


def call(line, extra=()):
    name, *arguments = shlex.split(line)
    command, = entry_points(group="console_scripts", name=name)
    expanded = [path for each in arguments for path in (glob(each) if "*" in each else [each])]
    with patch.dict(REPAIRS):  # a plugin's registration ends here
        return command.load()([*expanded, *extra])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "What the lines name: images, a teacher, a plugin, a grid and records."
    folder = tmp_path_factory.mktemp("elsewhere")
    for number in range(18):
        path = folder / "birds" / ("train", "val")[number % 3 == 0] / "auk owl".split()[number % 2]
        path.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 9 * number).convert("RGB").save(path / f"{number}.png")
    save_teacher(folder / "teacher.safetensors", seeded_network("resnet20", 2).state_dict(),
                 {"architecture": "resnet20", "dataset": "folder:birds"})
    (folder / "mine.py").write_text(PLUGIN)
    (folder / "grid.yaml").write_text(GRID)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        assert call("sortkd-run --pair resnet20:resnet8 --methods kd,kd+sort --dataset folder:birds", SMALL) == 0
    return folder


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    extra = []
    if line.startswith("sortkd-run"):
        extra = [*SMALL, *([] if "--dataset" in line else ["--dataset=folder:birds"])]
    assert call(line, extra) == 0


@pytest.mark.parametrize("line", PYTHON)
def test_lines_of_python(line):
    torch.manual_seed(0)
    names = vars(sortkd) | dict(
        student_logits=torch.randn(8, 10), teacher_logits=torch.randn(8, 10), epoch=3,
        target=torch.randint(10, (8,)), student_hidden=torch.randn(8, 4), teacher_hidden=torch.randn(8, 6),
        student_head=nn.Linear(4, 10), teacher_head=nn.Linear(6, 10), compare=compare,
        LinearDistillationLoss=LinearDistillationLoss, load_teacher=load_teacher)
    names["values"], names["classes"] = names["teacher_logits"].topk(4)
    exec(line, names)
    assert "loss" not in names or names["loss"].isfinite()


def test_every_line_is_tried():
    assert len(COMMANDS) > 6 and len(PYTHON) > 4 and len(WORKFLOW) == 1
