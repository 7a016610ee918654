"Data of one's own: folders, CIFAR-10, two splits; and experiments on them."
import json
import os
import shutil
from dataclasses import replace

import numpy
import pytest
import torch
from conftest import raises
from PIL import Image
from test_data import random_images
from torchvision.datasets import FakeData

from sortkd.experiment.one_run import prepare_run
from sortkd.experiment.pairs import check_takes
from sortkd.experiment.record import RecordError, check_record, compare_runs
from sortkd.experiment.repeat import prepare_repetition
from sortkd.experiment.run import run_experiment
from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.storage import read_records
from sortkd.fronts.commands import evaluate_command, run
from sortkd.train.image_files import ImageFolderData
from sortkd.train.images import ImageData, channel_statistics, load_data, load_folder
from sortkd.train.networks import create_model
from sortkd.train.teachers import find_teacher, save_teacher


def noise(count, size=32):
    return random_images(count, size, "noise").numpy()


def save_images(folder, count=4, size=32, kind="png"):
    folder.mkdir(parents=True)
    for number, pixels in enumerate(noise(count, size)):
        Image.fromarray(pixels).save(folder / f"{number}.{kind}")


@pytest.fixture
def birds(tmp_path):
    for name in ("owl", "wren"):
        save_images(tmp_path / "birds" / "train" / name)
        save_images(tmp_path / "birds" / "test" / name, 2)
    return tmp_path / "birds"


def test_a_folder_of_small_squares_is_in_memory(birds):
    data = load_data(f"folder:{birds}")
    assert isinstance(data, ImageData)
    assert (data.name, data.class_names) == ("folder:birds", ("owl", "wren"))
    assert (data.pad, data.flip, data.image_size) == (4, True, 32)
    assert torch.equal(data.train_images[:4], torch.from_numpy(noise(4)))
    assert data.train_targets.tolist() == [0] * 4 + [1] * 4
    pixels = data.train_images.double().reshape(-1, 3) / 255
    assert data.mean == pytest.approx(pixels.mean(0).tolist(), abs=5.1e-5)
    assert data.std == pytest.approx(pixels.std(0, correction=0).tolist(), abs=5.1e-5)
    assert data.normalization == {"mean": [*data.mean], "std": [*data.std]}
    moved = birds.rename(birds.with_name("my birds, 2"))
    assert load_folder(moved).name == "folder:my-birds-2"
    (moved / "test").rename(moved / "val")
    assert load_folder(moved).checksum == data.checksum, "test images may be in `val` or `test`"


@pytest.mark.parametrize("size", [(96, 96), (32, 30)])
def test_large_or_mixed_images_are_streamed(birds, size):
    Image.new("RGB", size, "red").save(birds / "test" / "wren" / "9.jpg")
    data = load_folder(birds)
    assert isinstance(data, ImageFolderData) and data.views_per_image is None
    assert data.image_size == 224
    assert (len(data.train_files), len(data.test_files)) == (8, 5)
    assert data.mean == pytest.approx([0.5] * 3, abs=0.02)
    assert data.normalization["std"] == [*data.std] and max(data.std) < 0.3


def test_what_a_folder_holds_besides_images(birds):
    checksum = load_folder(birds).checksum
    save_images(birds / "train" / ".ipynb_checkpoints")
    save_images(birds / "test" / "owl" / "@eaDir")
    for name in ("._0.png", ".DS_Store", "notes.TXT"):
        (birds / "train" / "wren" / name).write_bytes(b"none")
    (birds / "train" / "list.csv").write_text("none")
    assert load_folder(birds).checksum == checksum
    (birds / "train" / "wren" / "3.png").rename(birds / "train" / "wren" / "3.PNG")
    assert load_folder(birds).checksum == checksum, "capitals do not matter"


@pytest.mark.parametrize("spoil, words", [
    (shutil.rmtree, "birds/train: .*expected in train/CLASS/"),
    (lambda root: shutil.rmtree(root / "test"), "birds/val: .*test/CLASS/"),
    (lambda root: shutil.rmtree(root / "test" / "owl"), "must have the same class folders.*'owl'"),
    (lambda root: save_images(root / "test" / "tit"), "'tit' is in one of them alone"),
    (lambda root: [path.unlink() for path in (root / "train" / "wren").iterdir()],
     "train: .*class wren"),
    (lambda root: [(root / "train").rename(root / "other"), (root / "train").touch()],
     "/train: .*Not a directory"),
    (lambda root: [shutil.rmtree(root / "test"), (root / "test").mkdir(),
                   (root / "test" / "1.png").touch()], "/test: .*any class folder"),
    (lambda root: os.truncate(root / "test" / "owl" / "1.png", 500),
     "1.png cannot be read as an image")])
def test_spoiled_folders_get_one_line(birds, spoil, words):
    spoil(birds)
    with pytest.raises((ValueError, OSError), match=words) as error:
        load_folder(birds)
    assert "\n" not in str(error.value)


def test_cifar10(monkeypatch):
    parts = {f"{split}_{kind}": value for split in ("train", "test") for kind, value in (
        ("images", torch.from_numpy(noise(4))), ("targets", torch.arange(4)))}
    monkeypatch.setattr("sortkd.train.images.read_cifar",
                        lambda name, root: parts | {"class_names": tuple("abcd")})
    data = load_data("cifar10")
    assert (data.name, data.num_classes, data.pad, data.flip) == ("cifar10", 4, 4, True)
    assert (data.mean, data.std) == channel_statistics(data.train_images)


def test_splits_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["owl", "wren"])
    features = datasets.Features({"img": datasets.Image(), "fine_label": names})
    images = [Image.fromarray(each) for each in noise(4)]
    split = datasets.Dataset.from_dict({"img": images, "fine_label": [0, 1, 1, 0]}, features)
    data = ImageData.from_splits(split, split, "birds", flip=False)
    assert torch.equal(data.train_images, torch.from_numpy(noise(4)))
    assert data.class_names == ("owl", "wren") and not data.flip


@pytest.mark.parametrize("image, label", [
    ("image", "label"), ("img", "fine_label"), ("pixel_values", "y"), ("images", "targets")])
def test_columns_that_are_known(image, label):
    more = {"coarse_label": 0} if label == "fine_label" else {"id": 7}
    labels = [0, 1, 0, 1]
    examples = [{**more, image: pixels, label: each} for pixels, each in zip(noise(4), labels)]
    data = ImageData.from_splits(examples, examples)
    assert data.train_targets.tolist() == labels
    assert torch.equal(data.train_images, torch.from_numpy(noise(4)))


class Named(list):
    "Pairs of image and label that know the names of their classes, as a split of torchvision does."
    def __init__(self, labels, classes):
        super().__init__(zip(noise(len(labels)), labels))
        self.classes = classes


def test_names_of_classes():
    named, plain = Named([0, 1], ["owl", "wren"]), list(Named([0, 1], []))
    for train, test, given in ((named, named, ()), (named, plain, ()), (plain, named, ()),
                               (plain, plain, ["owl", "wren"])):
        data = ImageData.from_splits(train, test, class_names=given)
        assert data.class_names == ("owl", "wren") and data.test_targets.tolist() == [0, 1]
    data = ImageData.from_splits(plain, plain)
    assert (data.name, data.class_names, data.pad, data.flip) == ("own", ("0", "1"), 4, True)
    for other in (["wren", "owl"], ["owl", "wren", "tit"]):
        with pytest.raises(ValueError, match="train has the classes .'owl', 'wren'., and test "):
            ImageData.from_splits(named, Named([0, 1], other))


@pytest.mark.parametrize("examples, words", [
    ([5], "Give .image, label"), ([{"pixels": 1, "label": 0}], "'image'"),
    ([(Image.new("F", (8, 8)), 0)], "mode F has no fixed range"),
    ([(noise(1)[0], 0.5)], "'float' object"), ([(torch.zeros(3, 32, 32), 0)], "Cannot handle this"),
    ([(noise(1)[0], 0), (noise(1, 30)[0], 1)], "must have the same shape"),
    ([(noise(1)[0][:, :20], 0)] * 2, r"train_images is .*\(2, 32, 20, 3\)")])
def test_splits_that_do_not_fit(examples, words):
    with pytest.raises(ValueError, match=words):
        ImageData.from_splits(examples, examples)


SMALL = {"pair": "resnet14:resnet8", "methods": "kd,kd+sort", "preset": "quick", "epochs": 1,
         "device": "cpu"}


def small(tmp_path, results="results", **changes):
    places = {"teachers_dir": str(tmp_path / "teachers"), "results_dir": str(tmp_path / results)}
    return prepare_experiment(**SMALL | {"methods": "kd"} | places | changes)


def test_an_experiment_on_a_folder_and_its_repetition(birds, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    assert run([*options, "--dataset=folder:birds"]) == 0
    records = read_records("results/quick.jsonl")
    assert [check_record(each)["method"]["name"] for each in records] == ["kd", "kd+sort"]
    data, mean = records[0]["data"], [*load_folder(birds).mean]
    assert (data["name"], data["classes"], data["mean"]) == ("folder:birds", 2, mean)
    assert not records[0]["full_recipe"] and records[0]["teacher_logits"] != "computed"
    assert str(tmp_path) not in json.dumps(records), "a path may be private"
    with pytest.raises(RecordError, match="data.std"):
        check_record(records[0] | {"data": data | {"std": [0.1]}})
    birds.rename(tmp_path / "moved")
    source = f"--from-record=results/quick.jsonl:{records[1]['run_id']}"
    assert run([source]) == 1 and "say where they are" in capsys.readouterr().err
    assert run([source, "--dataset=digits"]) == 1 and "folder:PATH" in capsys.readouterr().err
    assert run([source, "--dataset=folder:moved"]) == 0
    assert "agree to the bit" in capsys.readouterr().out
    teacher, = (tmp_path / "teachers" / "local").glob("*.safetensors")
    assert evaluate_command([str(teacher)]) == 1
    assert "folder:PATH" in capsys.readouterr().err
    assert evaluate_command([str(teacher), "--dataset=folder:moved"]) == 0
    Image.new("RGB", (32, 32)).save(tmp_path / "moved" / "train" / "owl" / "0.png")
    assert run([source, "--dataset=folder:moved"]) == 1
    assert "data.checksum" in capsys.readouterr().err


def test_an_experiment_on_streamed_images(birds, tmp_path):
    Image.new("RGB", (200, 100), "red").save(birds / "test" / "wren" / "9.jpg")
    dataset = f"folder:{birds}"
    plan = small(tmp_path, dataset=dataset, test_size=2, train_size=4)
    assert plan.cache == "off" and plan.data.image_size == 224
    with pytest.raises(ValueError, match="strongly augmented"):
        small(tmp_path, dataset=dataset, methods="mlkd")
    pair = "imagenet/ResNet34:imagenet/ResNet18"
    assert small(tmp_path, dataset=dataset, pair=pair).pair.student == "imagenet/ResNet18"
    assert small(tmp_path, dataset=dataset, pair="in_r34_r18").recipe.batch_size == 16


def test_a_teacher_of_a_folder_of_the_same_name_is_not_taken(birds, tmp_path):
    data = load_folder(birds)
    text = {"architecture": "resnet8", "dataset": data.name, "complete": True, "epochs": 240,
            "data_checksum": "other"}
    weights = create_model("resnet8", 2).state_dict()
    save_teacher(tmp_path / "teachers" / "one.safetensors", weights, text)
    training = {"data_checksum": data.checksum}
    assert find_teacher("resnet8", data, tmp_path / "teachers", 100, training) is None
    save_teacher(tmp_path / "teachers" / "two.safetensors", weights, text | training)
    found = find_teacher("resnet8", data, tmp_path / "teachers", 100, training)
    assert found.file == "two.safetensors"


def test_splits_of_torchvision():
    train, test = FakeData(12, (3, 20, 20), 4), FakeData(6, (3, 20, 20), 4, random_offset=1)
    data = ImageData.from_splits(train, test)
    assert (data.name, data.pad, data.flip) == ("own", 2, True)
    assert data.class_names == tuple("0123"[:data.num_classes])
    assert numpy.array_equal(data.train_images[5], train[5][0])
    assert data.train_targets.tolist() == [train[number][1] for number in range(12)]


def test_an_interrupted_experiment_on_a_folder_continues(birds, tmp_path):
    def plan(name):
        return small(tmp_path, name, methods="kd+sort", epochs=2, dataset=f"folder:{birds}")

    straight, = run_experiment(plan("straight"), progress=False).records
    with pytest.raises(KeyboardInterrupt):
        run_experiment(plan("broken"), progress=False, callbacks=[raises(KeyboardInterrupt)])
    assert list((tmp_path / "broken").rglob("checkpoint.pt")), "one of two epochs is trained"
    continued, = run_experiment(plan("broken"), progress=False).records
    assert compare_runs(straight, continued) == []


def test_the_published_recipe_on_other_data(birds, tmp_path, monkeypatch):
    # of runs that have not been made
    monkeypatch.setattr("sortkd.experiment.repeat.check_record", lambda record: record)
    paper = {"preset": "paper", "epochs": 0, "dataset": f"folder:{birds}"}
    plan = small(tmp_path, **paper)
    assert plan.recipe.epochs == 240 and not plan.is_full_recipe and not plan.preset.fetch_teacher
    assert "on folder:birds" in plan.describe() and "not with published ones" in plan.describe()
    changed = small(tmp_path, **paper, methods="mlkd", recipe="lr=0.01")
    about = {"weights_sha256": "0" * 64, "file": "none"}
    for each in (replace(plan, methods=changed.methods), changed):
        run = prepare_run(each, each.methods[0], 0, "cached", about)
        assert run.facts["recipe"]["epochs"] == 480, "MLKD's own length, on any data"
        assert not run.facts["full_recipe"]
        record = {**run.facts, "machine": {"threads": 1}}
        repeated = prepare_repetition(
            record, dataset=f"folder:{birds}", results_dir=str(tmp_path / "results"))
        assert repeated.recipe_for(repeated.methods[0]) == each.recipe_for(each.methods[0])


def test_a_network_that_cannot_take_the_images_is_refused(tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="squeezenet1_1 cannot take images of 16×16"):
        small(tmp_path, pair="resnet20:torchvision:squeezenet1_1", dataset="digits")
    state = torch.get_rng_state()
    check_takes("resnet8", 32, 10)
    assert torch.equal(state, torch.get_rng_state())
