"ImageNet: networks against the reference, folders that are refused, and views that depend on nothing but their key."
import json
import math
import os
import pickle
import subprocess
import sys
import urllib.error
import zlib
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import ResNet34_Weights
from torchvision.transforms import v2

from sortkd.data import batch_bounds, normalize, seeded_generator
from sortkd.imagenet import (
    IMAGENET_RECIPE, SAMPLE_REGIONS, ImageFolderBatches, create_imagenet_model, list_imagenet_models, load_image_folder,
    pretrained_weights, save_sample_folder,
)
from sortkd.teachers import load_weights
from sortkd.training import Recipe

GOLDENS = Path(__file__).parent / "goldens"
SHAPES = json.loads((GOLDENS / "state_dict_shapes.json").read_text())
LOGITS = np.load(GOLDENS / "model_logits.npz")
every_network = pytest.mark.parametrize("name", list_imagenet_models())
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_sample_folder(tmp_path_factory.mktemp("sample") / "imagenet")


@pytest.fixture(scope="module")
def data(root):
    return load_image_folder(root, image_size=32)


@pytest.fixture
def folder(tmp_path):
    "A folder that a test may spoil."
    return save_sample_folder(tmp_path / "imagenet", train=2, test=1)


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


def golden_state_dict(shapes):
    state_dict = {}
    for key, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            values = np.zeros(shape, dtype=np.int64)
        elif key.endswith("running_var"):
            values = random.uniform(0.5, 1.5, shape)
        elif key.endswith(("running_mean", "bias")):
            values = 0.1 * random.standard_normal(shape)
        elif len(shape) == 1:
            values = random.uniform(0.5, 1.5, shape)
        else:
            values = random.standard_normal(shape) * math.sqrt(0.5 / math.prod(shape[1:]))
        state_dict[key] = torch.as_tensor(values)
    return state_dict


# Networks


def test_list_is_the_reference_list():
    assert sorted(list_imagenet_models()) == sorted(name for name in SHAPES if name.startswith("imagenet/"))
    list_imagenet_models().clear()
    assert list_imagenet_models(), "list_imagenet_models() must hand out a list of its own"


@every_network
def test_keys_order_and_shapes(name):
    with torch.device("meta"):
        state_dict = create_imagenet_model(name).state_dict()
    assert [(key, list(value.shape)) for key, value in state_dict.items()] == list(SHAPES[name].items())


@every_network
def test_golden_logits(name):
    images = torch.tensor(np.random.RandomState(0).standard_normal((2, 3, 224, 224)), dtype=torch.float32)
    network, golden = create_imagenet_model(name).eval(), LOGITS[name.replace("/", "__")]
    network.load_state_dict(golden_state_dict(SHAPES[name]))
    with torch.no_grad():
        logits = network(images).numpy()
    assert np.linalg.norm(logits - golden) / np.linalg.norm(golden) < 1e-5


@pytest.mark.parametrize("name", ["imagenet/ResNet18", "imagenet/MobileNetV1"])
def test_logits_stay_float32_under_autocast(name):
    torch.manual_seed(0)
    network = create_imagenet_model(name, num_classes=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(torch.randn(4, 3, 64, 64))
    assert logits.dtype == torch.float32 and logits.shape == (4, 5)
    assert not torch.equal(logits, logits.bfloat16().float()), "no rounding on the way"
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("name", ["imagenet/ResNet18", "imagenet/MobileNetV1"])
def test_copies_repeats_and_compiles(name):
    torch.manual_seed(0)
    network = create_imagenet_model(name, num_classes=5).eval()
    torch.manual_seed(0)
    again = create_imagenet_model(name, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(again(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(network))(images), expected)
        torch.testing.assert_close(compiled(images), expected)


def test_features_of_the_student():
    network = create_imagenet_model("imagenet/MobileNetV1").eval()
    with torch.no_grad():
        logits, features = network(torch.randn(1, 3, 96, 96), return_features=True)
    assert [tuple(maps.shape[1:]) for maps in features.maps] == [
        (64, 48, 48), (128, 24, 24), (256, 12, 12), (512, 6, 6), (1024, 3, 3)]
    assert torch.equal(network.classifier_layer(features.pooled), logits)


@pytest.mark.parametrize("arguments, error", [
    (("resnet18",), r"no ImageNet network 'resnet18'; choose imagenet/ResNet18"),
    (("imagenet/VGG",), "imagenet/VGG"),
    ((None,), "None"),
    ((["imagenet/ResNet18"],), "no ImageNet network"),
    (("imagenet/ResNet18", 1), "num_classes must be at least 2, but is 1"),
    (("imagenet/MobileNetV1", "ten"), "num_classes must be an integer, but is 'ten'"),
])
def test_wrong_names_and_classes(arguments, error):
    with pytest.raises((ValueError, TypeError), match=error):
        create_imagenet_model(*arguments)


@pytest.mark.parametrize("name", ["imagenet/ResNet18", "imagenet/MobileNetV1"])
def test_a_part_without_images(name):
    "What a rank is given that has no part in a batch."
    network = create_imagenet_model(name, num_classes=5).eval()
    logits = network(torch.empty(0, 3, 64, 64))
    assert logits.shape == (0, 5)
    logits.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in network.parameters())


# Published weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty hub folder and a network on which every request fails; yields the folder and the requests."
    requests = []

    def refuse(request, *arguments, **named):
        requests.append(request.full_url)
        raise urllib.error.URLError("the network is unreachable")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "checkpoints", requests


@pytest.mark.parametrize("name, file", [("imagenet/ResNet34", "resnet34-b627a593.pth"),
                                        ("imagenet/ResNet50", "resnet50-0676ba61.pth")])
def test_weights_without_a_network(hub, name, file):
    with pytest.raises(FileNotFoundError) as caught:
        pretrained_weights(name)
    assert hub[1] == [f"https://download.pytorch.org/models/{file}"]
    for part in (name, hub[1][0], "unreachable", "checkpoint"):
        assert part in str(caught.value)


def test_weights_are_found_and_fit(hub):
    network = create_imagenet_model("imagenet/ResNet34")
    hub[0].mkdir()
    torch.save(network.state_dict(), hub[0] / "resnet34-b627a593.pth")
    weights = pretrained_weights("imagenet/ResNet34")
    assert not hub[1], "a file that is there is not downloaded"
    other = load_weights(create_imagenet_model("imagenet/ResNet34"), weights)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items())


def test_a_download_with_another_checksum_is_refused(hub, tmp_path, monkeypatch):
    served = tmp_path / "served.pth"
    torch.save({"fc.weight": torch.zeros(2)}, served)
    monkeypatch.setattr(torch.hub, "urlopen", lambda request, **named: urllib.request.urlopen(served.as_uri()))
    with pytest.raises(FileNotFoundError, match="invalid hash"):
        pretrained_weights("imagenet/ResNet34")
    assert not list(hub[0].iterdir()), "what was refused is not kept"


def test_damaged_or_hostile_weights(hub, tmp_path):
    class CreatesFile:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    hub[0].mkdir()
    file = hub[0] / "resnet34-b627a593.pth"
    torch.save({"fc.weight": torch.zeros(2)}, file)
    contents = [b"", b"hello", file.read_bytes()[:300], pickle.dumps(CreatesFile(), protocol=2)]
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(ValueError, match="resnet34-b627a593.pth cannot be read as weights"):
            pretrained_weights("imagenet/ResNet34")
    assert not (tmp_path / "executed").exists()


def test_networks_without_published_weights():
    with pytest.raises(ValueError, match="no weights of imagenet/MobileNetV1"):
        pretrained_weights("imagenet/MobileNetV1")
    with pytest.raises(ValueError, match="no ImageNet network 'ResNet34'"):
        pretrained_weights("ResNet34")


# Folders


def test_a_folder_as_data(root):
    data = load_image_folder(root)
    assert (data.name, data.image_size, data.resize, data.num_classes) == ("imagenet", 224, 256, 4)
    assert data.class_names == tuple(sorted(SAMPLE_REGIONS)) and data.mean == (0.485, 0.456, 0.406)
    assert torch.equal(data.train_targets, torch.arange(4).repeat_interleave(12))
    assert len(data.test_files) == 16 and data.test_files[5] == "val/leaves/val_00001.JPEG"
    assert all((data.root / file).is_file() for file in (*data.train_files, *data.test_files))
    assert len({opened(data.root / file).size for file in data.train_files}) > 40, "sizes vary"
    assert "48 train, 16 test" in repr(data)
    with pytest.raises(FrozenInstanceError):
        data.name = "other"


def test_the_default_place(root, monkeypatch, tmp_path):
    monkeypatch.setenv("SORTKD_DATA", str(root.parent))
    assert load_image_folder().root == root
    monkeypatch.delenv("SORTKD_DATA")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(root.parent)
    data = load_image_folder()
    assert data.root == tmp_path / "data" / "imagenet"
    monkeypatch.chdir(root)
    assert len(list(ImageFolderBatches(data, workers=0).test(16))) == 1, "a change of the working folder does no harm"


def test_checksum(root, folder):
    data = load_image_folder(folder)
    checksum = data.checksum
    moved = folder.rename(folder.with_name("moved"))
    assert load_image_folder(moved).checksum == checksum
    data = load_image_folder(moved)
    reordered = replace(data, test_files=data.test_files[::-1], test_targets=data.test_targets.flip(0))
    assert reordered.checksum == checksum
    swapped = replace(data, train_targets=data.train_targets.flip(0))
    others = {swapped.checksum, load_image_folder(moved, 192).checksum, data.subset(train_size=4).checksum}
    first = moved / data.train_files[0]
    first.write_bytes(first.read_bytes() + b"\0")
    others.add(load_image_folder(moved).checksum)
    first.rename(first.with_name("renamed.JPEG"))
    others.add(load_image_folder(moved).checksum)
    assert len(others) == 5 and checksum not in others


def test_subset(data):
    for size in (4, 6, 47):
        part = data.subset(train_size=size, test_size=4, seed=1)
        counts = torch.bincount(part.train_targets, minlength=4)
        assert counts.sum() == size and counts.max() - counts.min() <= 1
        assert torch.bincount(part.test_targets).tolist() == [1] * 4
        assert all(part.class_names[target] == file.split("/")[1]
                   for file, target in zip(part.train_files, part.train_targets, strict=True))
    assert set(data.subset(6).train_files) < set(data.subset(20).train_files)
    assert data.subset().checksum == data.checksum
    assert data.subset(8, seed=0).checksum != data.subset(8, seed=1).checksum
    for arguments, error in (((49,), "train_size is 49"), ((-1,), "at least 0"), ((0, 0.5), "must be an integer")):
        with pytest.raises((ValueError, TypeError), match=error):
            data.subset(*arguments)


def spoil_missing_val(folder):
    (folder / "val").rename(folder / "validation")


def spoil_file_for_train(folder):
    (folder / "train").rename(folder / "other")
    (folder / "train").write_text("")


def spoil_no_classes(folder):
    (folder / "train").rename(folder / "other")
    (folder / "train").mkdir()


def spoil_flat_val(folder):
    (folder / "val").rename(folder / "other")
    (folder / "val").mkdir()
    (folder / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"1")


def spoil_missing_class(folder):
    (folder / "val" / "trees").rename(folder / "trees")


def spoil_surplus_class(folder):
    (folder / "val" / "zebra").mkdir()


def spoil_empty_class(folder):
    for file in (folder / "train" / "pagoda").iterdir():
        file.rename(file.with_suffix(".txt"))


def spoil_empty_file(folder):
    (folder / "val" / "trees" / "val_00000.JPEG").write_bytes(b"")


def spoil_single_class(folder):
    for split in ("train", "val"):
        for name in ("trees", "pagoda", "leaves"):
            (folder / split / name).rename(folder / f"{split}-{name}")


@pytest.mark.parametrize("spoil, kind, error", [
    (spoil_missing_val, FileNotFoundError, r"no folder .*/val: ImageNet is expected as train/CLASS"),
    (spoil_file_for_train, NotADirectoryError, r"/train is a file"),
    (spoil_no_classes, ValueError, r"/train holds no class folders: "),
    (spoil_flat_val, ValueError, r"/val holds no class folders; its files \(1\) must be sorted"),
    (spoil_missing_class, ValueError, r"same class folders as .*1 only in train, such as 'trees'"),
    (spoil_surplus_class, ValueError, r"same class folders as .*1 only in val, such as 'zebra'"),
    (spoil_empty_class, ValueError, r"/train has classes without images.*pagoda"),
    (spoil_empty_file, ValueError, r"val_00000.JPEG is empty"),
    (spoil_single_class, ValueError, r"at least two classes, but is \('dahlia',\)"),
], ids=lambda value: getattr(value, "__name__", None))
def test_spoiled_folders(folder, spoil, kind, error):
    spoil(folder)
    with pytest.raises(kind, match=error):
        load_image_folder(folder)


def test_root_that_is_missing_or_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_image_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        load_image_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        load_image_folder(tmp_path, image_size=0)


@pytest.mark.parametrize("changes, error", [
    ({"train_targets": torch.zeros(47, dtype=torch.int64)}, r"train_targets must have shape \(48,\)"),
    ({"train_targets": torch.full((48,), 4)}, r"must lie in 0..3, but holds 4"),
    ({"test_targets": torch.zeros(16)}, "test_targets must be a torch.int64 tensor, but is torch.float32"),
    ({"test_files": (), "test_targets": torch.zeros(0, dtype=torch.int64)}, "at least one"),
    ({"std": (0.2, 0.0, 0.2)}, "std must be three numbers"),
    ({"image_size": 300}, "resize must be at least 300"),
])
def test_data_that_does_not_fit(data, changes, error):
    with pytest.raises((ValueError, TypeError), match=error):
        replace(data, **changes)


def test_a_file_that_vanished(data):
    with pytest.raises(FileNotFoundError, match="gone.JPEG"):
        replace(data, test_files=(*data.test_files[:-1], "val/trees/gone.JPEG"))


def test_sample_folder_repeats_and_overwrites_nothing(root, tmp_path):
    again = save_sample_folder(tmp_path / "again")
    files = [path.relative_to(root) for path in root.rglob("*.JPEG")]
    assert len(files) == 64 and all((again / file).read_bytes() == (root / file).read_bytes() for file in files)
    with pytest.raises(FileExistsError, match="train exists"):
        save_sample_folder(root)
    with pytest.raises(ValueError, match="test must be at least 1"):
        save_sample_folder(tmp_path / "none", test=0)


# Views and batches


def epoch_of(data, batch_size=7, seed=0, epoch=1, rank=0, ranks=1, workers=0, device="cpu"):
    return list(ImageFolderBatches(data, device, workers=workers).train(batch_size, seed, epoch, rank, ranks))


def assert_same(one, other):
    assert len(one) == len(other)
    for (images, targets), (other_images, other_targets) in zip(one, other):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


def test_training_batches(data):
    "Order, bounds and pixels, with the transforms written out."
    order = torch.randperm(48, generator=seeded_generator("image order", 5, 2))
    batches = epoch_of(data, seed=5, epoch=2)
    assert [len(targets) for _, targets in batches] == [stop - start for start, stop in batch_bounds(48, 7)]
    assert torch.equal(torch.cat([targets for _, targets in batches]), data.train_targets[order])
    for images, _ in batches:
        assert images.shape[1:] == (3, 32, 32) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
    transform = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), v2.ToImage(),
                            v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)])
    for image, number in zip(torch.cat([images for images, _ in batches]), order.tolist()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded_generator("image view", 5, 2, number).initial_seed())
            expected = transform(opened(data.root / data.train_files[number]))
        torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_no_difference(data, workers):
    assert_same(epoch_of(data, workers=workers), epoch_of(data))


@pytest.mark.parametrize("ranks, batch_size", [(2, 7), (3, 7), (5, 23)])
def test_ranks_share_each_batch(data, ranks, batch_size):
    whole = epoch_of(data, batch_size)
    parts = [epoch_of(data, batch_size, rank=rank, ranks=ranks, workers=rank % 2) for rank in range(ranks)]
    assert_same(whole, [tuple(map(torch.cat, zip(*batch))) for batch in zip(*parts, strict=True)])
    for (start, stop), *batch in zip(batch_bounds(48, batch_size), *parts, strict=True):
        lengths = [len(part) for part in torch.arange(start, stop).tensor_split(ranks)]
        assert [len(images) for images, _ in batch] == [len(targets) for _, targets in batch] == lengths
        assert all(images.shape[1:] == (3, 32, 32) for images, _ in batch)
    assert (0 in [len(targets) for part in parts for _, targets in part]) == (ranks == 5), "48 in 23s leaves two images"


def test_a_view_is_a_function_of_seed_epoch_and_image(data):
    def views(seed, epoch, batch_size=7):
        order = torch.randperm(48, generator=seeded_generator("image order", seed, epoch))
        return torch.cat([images for images, _ in epoch_of(data, batch_size, seed, epoch)])[order.argsort()]

    assert torch.equal(views(0, 1), views(0, 1, batch_size=48)), "batches do not matter"
    for other in ((0, 2), (1, 1), (1, 0)):
        differs = (views(0, 1) != views(*other)).flatten(1).any(1)
        assert differs.float().mean() > 0.95
    crops = torch.stack([views(0, epoch)[0] for epoch in range(1, 9)])
    assert len(crops.flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(data, workers):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    batches = ImageFolderBatches(data, workers=workers)
    for _ in zip(range(2), batches.train(4, 0, 1)):
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(1)
        before = torch.random.get_rng_state()
    list(batches.test(16))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_test_images_are_those_of_the_published_teachers(root):
    data = load_image_folder(root).subset(test_size=4)
    transform = ResNet34_Weights.IMAGENET1K_V1.transforms()
    expected = torch.stack([transform(opened(root / file)) for file in data.test_files])
    for workers, ranks in ((0, 1), (2, 1), (0, 3)):
        parts = [list(ImageFolderBatches(data, workers=workers).test(3, rank, ranks)) for rank in range(ranks)]
        images, targets = (torch.cat([part[place] for batch in zip(*parts) for part in batch]) for place in (0, 1))
        torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
        assert torch.equal(targets, data.test_targets)


def test_an_epoch_can_be_left_early_and_begun_again(data):
    batches = ImageFolderBatches(data, workers=2)
    first = next(iter(batches.train(7, 0, 1)))
    assert_same([first], [next(iter(batches.train(7, 0, 1)))])
    one, two = batches.train(7, 0, 1), batches.train(7, 0, 2)  # two at a time
    assert_same([next(one), next(one)], epoch_of(data)[:2])
    assert_same([next(two)], epoch_of(data, epoch=2)[:1])


def test_dtype(data):
    images, _ = next(ImageFolderBatches(data, workers=0, dtype=torch.bfloat16).train(4, 0, 1))
    assert torch.equal(images, epoch_of(data, 4)[0][0].bfloat16())


@pytest.mark.parametrize("mode, kind", [("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG")])
def test_odd_images(folder, mode, kind):
    path = folder / "train" / "trees" / "train_00000.JPEG"
    original = opened(path).convert("RGB")
    original.convert(mode).save(path, format=kind)
    data = load_image_folder(folder, image_size=32)
    images = torch.cat([images for images, _ in ImageFolderBatches(
        replace(data, test_files=data.train_files, test_targets=data.train_targets), workers=0).test()])
    odd = images[data.train_files.index("train/trees/train_00000.JPEG")]
    like = original.convert("L").convert("RGB") if mode in ("L", "LA") else original
    view = v2.functional.pil_to_tensor(v2.CenterCrop(32)(v2.Resize(36)(like))).permute(1, 2, 0)[None]
    assert (odd - normalize(view, data.mean, data.std)[0]).abs().mean() < 0.15, "colours are right"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"no image", "half", None], ids=["text", "half", "gone"])
def test_an_unreadable_image_is_named(folder, workers, content):
    data = load_image_folder(folder, image_size=32)
    path = folder / "train" / "leaves" / "train_00001.JPEG"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:900] if content == "half" else content)
    with pytest.raises(ValueError) as caught:
        list(ImageFolderBatches(data, workers=workers).train(4, 0, 1))
    assert str(caught.value).startswith(f"{path} cannot be read as an image")
    assert "Traceback" not in str(caught.value)


def test_bad_arguments_are_refused_at_once(data):
    batches = ImageFolderBatches(data, workers=0)
    for call, error in ((lambda: batches.train(0, 0, 1), "batch_size must be at least 1"),
                        (lambda: batches.train(4, 0.5, 1), "seed must be an integer"),
                        (lambda: batches.train(4, 0, -1), "epoch must be at least 0"),
                        (lambda: batches.train(4, 0, 1, 2, 2), r"rank must lie in 0..1, but is 2"),
                        (lambda: batches.test(4, 0, 0), "ranks must be at least 1"),
                        (lambda: ImageFolderBatches(data, workers=-1), "workers must be at least 0"),
                        (lambda: ImageFolderBatches(data, dtype=torch.uint8), "floating point"),
                        (lambda: ImageFolderBatches("imagenet"), "must be ImageFolderData.*is str")):
        with pytest.raises((ValueError, TypeError), match=error):
            call()


# Processes


SCRIPT = """
import json, multiprocessing, sys, torch
from sortkd.imagenet import ImageFolderBatches, load_image_folder

def sums(root):
    "Of each batch; they are the same for the same images."
    batches = ImageFolderBatches(load_image_folder(root, 32), workers=1)
    return [float(images.double().sum()) for images, _ in batches.train(16, 0, 1)]

def main(root):
    torch.set_num_threads(2)
    torch.randn(512, 512) @ torch.randn(512, 512)  # starts threads, which a fork loses
    lines = [sums(root)]
    multiprocessing.set_start_method("spawn", force=True)
    print(json.dumps([*lines, sums(root)]))

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=main, args=(sys.argv[1],))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def test_workers_of_a_spawned_process_with_threads(data, tmp_path):
    "A worker that is forked (or what the platform has) after threads were at work, and one that is spawned."
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, tmp_path / "script.py", data.root], capture_output=True, text=True,
                          timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    expected = [float(images.double().sum()) for images, _ in epoch_of(data, 16)]
    assert json.loads(done.stdout) == [expected, expected]


def test_import_is_light():
    code = ("import sys, sortkd.imagenet; "
            "print([name for name in ('torchvision', 'PIL', 'sklearn', 'pandas') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]"


@needs_cuda
def test_on_a_gpu(data):
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state()
    on_gpu = epoch_of(data, workers=2, device="cuda")
    for (images, targets), (other_images, other_targets) in zip(on_gpu, epoch_of(data), strict=True):
        assert images.is_cuda and targets.is_cuda
        torch.testing.assert_close(images.cpu(), other_images, atol=1e-6, rtol=0)
        assert torch.equal(targets.cpu(), other_targets)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# Recipe


def test_the_recipe_is_one():
    recipe = Recipe(**IMAGENET_RECIPE)
    assert [recipe.lr_in(epoch) for epoch in (1, 30)] == [0.2, 0.2]
    assert recipe.lr_in(31) == pytest.approx(0.02) and recipe.lr_in(100) == pytest.approx(0.0002)
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay, recipe.momentum) == (100, 512, 1e-4, 0.9)
