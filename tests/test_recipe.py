"The whole method in one file, examples/recipe.py, trains what the package trains, to the last bit."
import runpy
import sys

import pytest
import torch
from conftest import ROOT, needs_cifar100, seeded_network

from sortkd.methods import create_method
from sortkd.train.devices import create_fabric
from sortkd.train.images import ImageData
from sortkd.train.trainer import Recipe, train

PATH = ROOT / "examples" / "recipe.py"


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(PATH))


@pytest.fixture(scope="module")
def data(recipe):
    "Coloured stripes, of the form of CIFAR-100; each class has its own."
    generator = torch.Generator().manual_seed(0)
    splits = []
    for count in (160, 60):
        target = torch.randint(100, (count,), generator=generator)
        colour = torch.stack([target * 2, target % 10 * 25, target // 10 * 25], dim=1)
        noise = torch.randint(56, (count, 32, 32, 3), generator=generator)
        splits += [(colour[:, None, None] * 0.8 + noise).to(torch.uint8), target]
    names = tuple(map(str, range(100)))
    return ImageData("stripes", *splits, names, recipe["MEAN"], recipe["STD"], pad=4, flip=True)


def seeded(seed, make, blocks):
    torch.manual_seed(seed)
    return make(blocks)


def test_the_recipe_trains_what_the_package_trains(recipe, data):
    "Two epochs of both, the second after a milestone: networks, crops, losses, accuracy."
    settings = recipe["settings"] | {"epochs": 2, "decay_after": (0.5,), "lr": 0.1}
    student, teacher = seeded(1, recipe["ResNet"], 1), seeded(2, recipe["ResNet"], 3)
    ours, our_teacher = seeded_network("resnet8", 100, 1), seeded_network("resnet20", 100, 2)
    for network in (teacher, our_teacher):  # so that its logits differ from image to image
        torch.nn.init.normal_(network.fc.weight, generator=torch.Generator().manual_seed(3))
    splits = data.train_images, data.train_targets, data.test_images, data.test_targets
    accuracies = recipe["train"](student, teacher, *splits, settings)
    fabric, method = create_fabric("cpu", "float32"), create_method("kd+sort")
    outcome = train(ours, data.batches("cpu"), method, Recipe(2, lr=0.1, milestones=(1,)), fabric,
                    teacher=our_teacher, seed=0)
    assert accuracies == [row["test_top1"] for row in outcome.curve]
    assert 0 < outcome.last["changed_rows"] == outcome.last["teacher_wrong_rows"]
    assert student.state_dict().keys() == outcome.last_weights.keys()
    for name, value in student.state_dict().items():
        assert torch.equal(value, outcome.last_weights[name]), name


@needs_cifar100
def test_the_recipe_runs_as_it_stands(monkeypatch, capsys):
    "With a few images; the teacher has the accuracy that its card tells, 63.06 %."
    monkeypatch.setattr(sys, "argv", [str(PATH), "epochs=1", "images=128"])
    runpy.run_path(str(PATH), run_name="__main__")
    said = capsys.readouterr().out
    assert "teacher: 63.0" in said and "student, last epoch: " in said
