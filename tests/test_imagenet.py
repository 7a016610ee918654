"ImageNet: folders that are refused, and views that depend on nothing but their key."
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import save_sample_folder
from PIL import Image
from torchvision.models import ResNet34_Weights
from torchvision.transforms import v2

from sortkd.train.augmentation import batch_bounds, normalize, seeded_generator
from sortkd.train.image_files import IMAGENET_RECIPE, ImageFolderBatches, load_image_folder, read_image, read_images, to_rgb
from sortkd.train.trainer import Recipe



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


# Folders


def test_a_folder_as_data(root):
    data = load_image_folder(root)
    assert (data.name, data.image_size, data.resize, data.num_classes) == ("imagenet", 224, 256, 4)
    assert data.class_names == ("dahlia", "leaves", "pagoda", "trees")
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
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
    for arguments, error in (((49,), "train_size is 49"), ((-1,), "train_size is -1"), ((0, 0.5), "test_size is 0.5")):
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


def spoil_single_class(folder):
    for split in ("train", "val"):
        for name in ("trees", "pagoda", "leaves"):
            (folder / split / name).rename(folder / f"{split}-{name}")


@pytest.mark.parametrize("spoil, kind, error", [
    (spoil_missing_val, FileNotFoundError, r"/val: .*ImageNet is expected as train/CLASS"),
    (spoil_file_for_train, NotADirectoryError, r"/train: .*Not a directory.*ImageNet is expected"),
    (spoil_no_classes, FileNotFoundError, r"/train: .*any class folder.*ImageNet is expected"),
    (spoil_flat_val, FileNotFoundError, r"/val: .*any class folder.*ImageNet is expected"),
    (spoil_missing_class, ValueError, r"same class folders as .*'trees' is in one of them alone"),
    (spoil_surplus_class, FileNotFoundError, r"/val: .*classes zebra"),
    (spoil_empty_class, FileNotFoundError, r"/train: .*pagoda"),
    (spoil_single_class, ValueError, r"class_names is \('dahlia',\)"),
], ids=lambda value: getattr(value, "__name__", None))
def test_spoiled_folders(folder, spoil, kind, error):
    spoil(folder)
    with pytest.raises(kind, match=error):
        load_image_folder(folder)


def test_root_that_is_missing_or_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_image_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="Not a directory.*file/train"):
        load_image_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="image_size is 0; give"):
        load_image_folder(tmp_path, image_size=0)


@pytest.mark.parametrize("changes, error", [
    ({"train_targets": torch.zeros(47, dtype=torch.int64)}, r"train_targets has shape \(47,\); give one target for each of the 48"),
    ({"train_targets": torch.full((48,), 4)}, "train_targets holds 4; give numbers from 0 to 3"),
    ({"test_targets": torch.zeros(16)}, "test_targets is of type torch.float32; give a torch.int64 tensor"),
    ({"test_files": (), "test_targets": torch.zeros(0, dtype=torch.int64)}, "at least one"),
    ({"std": (0.2, 0.0, 0.2)}, "std is 0.0; give"),
    ({"image_size": 300}, "resize is 36; give a whole number from 300"),
])
def test_data_that_does_not_fit(data, changes, error):
    with pytest.raises((ValueError, TypeError), match=error):
        replace(data, **changes)


def test_a_file_that_vanished(data):
    with pytest.raises(FileNotFoundError, match="gone.JPEG"):
        replace(data, test_files=(*data.test_files[:-1], "val/trees/gone.JPEG"))


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


@pytest.mark.parametrize("rank, ranks", [(0, 1), (1, 3)])
def test_blocks_are_single_steps(data, rank, ranks):
    whole, part = epoch_of(data, seed=5), epoch_of(data, seed=5, rank=rank, ranks=ranks)
    blocks = list(ImageFolderBatches(data, workers=0).blocks(7, 5, 1, rank=rank, ranks=ranks))
    for block, (_, targets), (images, _), (start, stop) in zip(blocks, whole, part, batch_bounds(48, 7), strict=True):
        assert block.begin == start and block.bounds == [(0, stop - start)] and block.views is None
        assert torch.equal(block.target, targets), "of all ranks"
        assert torch.equal(block.images(0), images)


def test_the_face_of_data_in_files(data):
    pixels, inputs, targets = data.examples(3)
    expected, _ = next(ImageFolderBatches(data, workers=0).test(3))
    assert pixels.shape == (3, 32, 32, 3) and pixels.dtype == torch.uint8 and torch.equal(inputs, expected)
    assert torch.equal(inputs, normalize(pixels, data.mean, data.std)) and torch.equal(targets, data.test_targets[:3])
    assert data.views_per_image is None and len(data.examples(100)[0]) == 16
    assert isinstance(data.batches("cpu"), ImageFolderBatches) and data.batches("cpu").data is data


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


def grey_levels(mode, levels, opacity=255):
    "A row of grey pixels of `levels` from 0 to 255 in an image of `mode`."
    levels = numpy.asarray(levels, numpy.uint8)[None]
    if mode.startswith("I;16"):
        order = {"I;16B": ">u2", "I;16L": "<u2"}.get(mode, "=u2")
        return Image.frombuffer(mode, levels.T.shape, (levels.astype(order) * 257).astype(order).tobytes(), "raw", mode, 0, 1)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = Image.fromarray(levels).convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
        image.putalpha(Image.new("L", image.size, opacity))
        return image.convert(mode)
    return Image.fromarray(levels).convert(mode)


KEPT = {"1": 0, "L": 0, "P": 0, "RGB": 0, "RGBX": 0, "HSV": 0, "CMYK": 0, "YCbCr": 0, "LAB": 3, "LA": 0, "La": 0, "PA": 0,
        "RGBA": 0, "RGBa": 0, "I;16": 0, "I;16L": 0, "I;16B": 0, "I;16N": 0}  # mode: error of at most so many levels


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_becomes_rgb_or_is_refused(mode):
    levels = [0, 255] if mode == "1" else [0, 1, 60, 128, 200, 254, 255]
    if mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"mode {mode} has no fixed range"):
            to_rgb(grey_levels(mode, levels))
        return
    image = grey_levels(mode, levels)
    assert image.mode == mode and to_rgb(image).mode == "RGB"
    pixels = numpy.asarray(to_rgb(image)).astype(int)
    assert numpy.abs(pixels - numpy.array(levels)[None, :, None]).max() <= KEPT[mode]
    if image.has_transparency_data:
        for opacity, far in ((0, 0), (128, 64)):  # black and white differ from what lies below
            pixels = numpy.asarray(to_rgb(grey_levels(mode, [0, 255], opacity))).astype(int)
            assert numpy.abs(numpy.abs(pixels - 128) - far).max() <= 2


@pytest.mark.parametrize("name, mode, about", [
    ("grey16.png", "I;16", {}), ("grey16.tif", "I;16", {}), ("grey16.pgm", "I;16", {}), ("clear.png", "P", {"transparency": 0}),
    ("clear.gif", "P", {"transparency": 0}), ("clear.png", "L", {"transparency": 0}), ("photo.jpg", "L", {}), ("printed.jpg", "CMYK", {}), ("turned.jpg", "RGB", {}),
])
def test_files_of_odd_modes(tmp_path, name, mode, about):
    image = grey_levels(mode, [0, 100, 255])
    if name == "turned.jpg":
        about = {"exif": Image.Exif()}
        about["exif"][0x0112] = 6
    image.save(tmp_path / name, **about)
    pixels = numpy.asarray(read_image(tmp_path / name))[0, :, 0].astype(int)
    assert pixels.tolist() == pytest.approx([128 if "clear" in name else 0, 100, 255], abs=12), "EXIF turns nothing"


@pytest.mark.parametrize("kind", ["gif", "png", "tiff", "webp"])
def test_of_several_frames_the_first_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (200, 0)]
    frames[0].save(tmp_path / "0.jpg", format=kind, save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "0.jpg").getpixel((0, 0))[0] == pytest.approx(200, abs=4)


@pytest.mark.parametrize("kind", ["eps", "pdf", "fifo", "icns", "jpeg2000", "enormous", "folder"])
def test_files_that_are_not_opened(tmp_path, monkeypatch, kind):
    "Formats that start programs or were never promised, under the name of another; and what is not a file."
    path = tmp_path / "9.jpg"
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program is started"))
    if kind in ("fifo", "folder"):
        os.mkfifo(path) if kind == "fifo" else path.mkdir()
    elif kind == "enormous":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
        Image.new("L", (8, 8)).save(path, format="PNG")
    elif kind == "eps":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    else:
        Image.new("RGB", (16, 16)).save(path, format=kind)
    with pytest.warns() if kind == "enormous" else nullcontext(), pytest.raises(ValueError, match="9.jpg cannot be read as an image"):
        read_image(path)


def test_a_thread_of_an_image_is_not_resized(tmp_path):
    Image.new("L", (1, 60_000)).save(tmp_path / "thin.png")
    with pytest.raises(ValueError, match="thin.png has 1×60000 pixels, too narrow"):
        read_images(tmp_path, ["thin.png"], 224, 256)


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
    for call, error in ((lambda: batches.train(0, 0, 1), "batch_size is 0"),
                        (lambda: batches.train(4, 0.5, 1), "seed is 0.5"),
                        (lambda: batches.train(4, 0, -1), "epoch is -1"),
                        (lambda: ImageFolderBatches(data, workers=-1), "workers is -1")):
        with pytest.raises((ValueError, TypeError), match=error):
            call()


# Processes


SCRIPT = """
import json, multiprocessing, sys, torch
from sortkd.train.image_files import ImageFolderBatches, load_image_folder

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


@pytest.mark.slow
def test_workers_of_a_spawned_process_with_threads(data, tmp_path):
    "A worker that is forked (or what the platform has) after threads were at work, and one that is spawned."
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, tmp_path / "script.py", data.root], capture_output=True, text=True,
                          timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    expected = [float(images.double().sum()) for images, _ in epoch_of(data, 16)]
    assert json.loads(done.stdout) == [expected, expected]


@pytest.mark.cuda
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
