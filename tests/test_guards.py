"What would otherwise give wrong numbers, or hang, without a word: folders, images, weights, YAML."
import os
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sortkd.experiment.grid import read_grid
from sortkd.fronts.cards import model_card
from sortkd.train.image_files import list_image_files, to_rgb
from sortkd.train.networks import create_model
from sortkd.train.teachers import load_weights, read_checkpoint


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    return tmp_path


def test_what_people_do_not_mean_does_not_count(folder):
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "cat" / "._1.png").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list_image_files(folder)
    assert found["class_names"] == ("cat", "dog") and len(found["train_files"]) == 2
    (folder / "train" / "cat" / "notes.txt").touch()
    os.mkfifo(folder / "val" / "dog" / "2.png")  # opening it would wait for ever
    with pytest.warns(UserWarning, match="2 files in .* are left out"):
        assert list_image_files(folder)["train_files"] == found["train_files"]


@pytest.mark.parametrize("make", [
    lambda train: (train / "cat" / "again.png").symlink_to(train / "cat" / "1.png"),
    lambda train: (train / "loop").symlink_to(train),
    lambda train: (train / "cat" / "more").mkdir()])
def test_links_and_nested_folders_are_refused(folder, make):
    make(folder / "train")
    with pytest.raises(ValueError, match="is a link|within a class folder"):
        list_image_files(folder)


def test_hidden_colours_of_transparent_pixels_do_not_show():
    red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.asarray(to_rgb(red)).tolist() == [[[128] * 3] * 2] * 2
    assert np.asarray(to_rgb(Image.new("I;16", (1, 1), 65535))).tolist() == [[[255] * 3]]


@pytest.mark.parametrize(("name", "value"), [
    ("bn1.running_var", -1.0), ("bn1.running_var", 1e300), ("bn1.num_batches_tracked", 0.5),
    ("conv1.weight", torch.nan)])
def test_weights_that_no_training_gives(name, value):
    model = create_model("resnet8", 10)
    weights = {key: each.clone() for key, each in model.state_dict().items()}
    weights[name] = torch.full_like(weights[name], value, dtype=torch.float64)
    with pytest.raises(ValueError, match=name):
        load_weights(model, weights)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "plain.pth")
    with (zipfile.ZipFile(tmp_path / "plain.pth") as plain,
          zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert read_checkpoint(tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="small.pth cannot be read as weights"):
        read_checkpoint(tmp_path / "small.pth")


def test_aliases_of_yaml_are_refused(tmp_path):
    (tmp_path / "grid.yaml").write_text("a: &a [x, x]\npairs: [*a, *a]\n")
    with pytest.raises(ValueError, match="alias"):
        read_grid(tmp_path / "grid.yaml")


@pytest.mark.parametrize("name", ["torchvision:googlenet", "torchvision:inception_v3"])
def test_networks_with_helpers_give_logits_in_training(name):
    size = 75 if name.endswith("v3") else 32
    assert create_model(name, 5)(torch.randn(2, 3, size, size)).shape == (2, 5)


def test_a_card_of_malformed_text_is_one_clear_error(tmp_path):
    from safetensors.torch import save_file
    text = '{"architecture": "resnet8", "dataset": "cifar100", "epochs": "many", "top1": []}'
    save_file({"weight": torch.zeros(1)}, tmp_path / "bad.safetensors", {"sortkd": text})
    with pytest.raises(ValueError, match="bad.safetensors"):
        model_card(tmp_path / "bad.safetensors")
