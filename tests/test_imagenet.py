"ImageNet: folders that are refused, and crops that depend on nothing but their key."
import numpy
import pytest
import torch
from conftest import save_sample_folder
from PIL import Image
from torchvision.transforms import v2

from sortkd.train.augmentation import batch_bounds, seeded_generator
from sortkd.train.image_files import (
    IMAGENET_RECIPE, ImageFolderBatches, load_image_folder, read_image, to_rgb)
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


def epoch_of(data, seed=0, epoch=1, workers=0, device="cpu"):
    batches = ImageFolderBatches(data, device, workers=workers)
    return [each[:2] for each in batches.train(7, seed, epoch)]


def assert_same(one, other):
    assert len(one) == len(other)
    for (images, targets), (other_images, other_targets) in zip(one, other):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


def test_training_batches(data):
    "Order, bounds and pixels, with the transforms written out."
    order = torch.randperm(48, generator=seeded_generator("image order", 5, 2))
    batches = epoch_of(data, seed=5, epoch=2)
    sizes = [stop - start for start, stop in batch_bounds(48, 7)]
    assert [len(targets) for _, targets in batches] == sizes
    assert torch.equal(torch.cat([targets for _, targets in batches]), data.train_targets[order])
    for images, _ in batches:
        assert images.shape[1:] == (3, 32, 32) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
    transform = v2.Compose([
        v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)])
    for image, number in zip(torch.cat([images for images, _ in batches]), order.tolist()):
        path = data.root / data.train_files[number]
        with torch.random.fork_rng(devices=[]), Image.open(path) as photograph:
            torch.manual_seed(seeded_generator("image view", 5, 2, number).initial_seed())
            expected = transform(photograph)
        torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


def test_an_epoch_can_be_left_early_and_begun_again(data):
    batches = ImageFolderBatches(data, workers=2)
    next(batches.train(7, 0, 1))
    one, two = batches.train(7, 0, 1), batches.train(7, 0, 2)  # two at a time
    assert_same([next(one)[:2], next(one)[:2]], epoch_of(data)[:2])
    assert_same([next(two)[:2]], epoch_of(data, epoch=2)[:1])


def grey_levels(mode, levels, opacity=255):
    "A row of grey pixels of `levels` from 0 to 255 in an image of `mode`."
    levels = numpy.asarray(levels, numpy.uint8)[None]
    if mode.startswith("I;16"):
        order = {"I;16B": ">u2", "I;16L": "<u2"}.get(mode, "=u2")
        content = (levels.astype(order) * 257).astype(order).tobytes()
        return Image.frombuffer(mode, levels.T.shape, content, "raw", mode, 0, 1)
    if mode in ("LA", "PA", "RGBA", "RGBa"):
        image = Image.fromarray(levels).convert({"RGBa": "RGBA"}.get(mode, mode))
        image.putalpha(Image.new("L", image.size, opacity))
        return image.convert(mode)
    return Image.fromarray(levels).convert(mode)


@pytest.mark.parametrize("mode", [mode for mode in Image.MODES if mode != "La"])  # of no file
def test_every_mode_becomes_rgb_or_is_refused(mode):
    levels = [0, 255] if mode == "1" else [0, 1, 60, 128, 200, 254, 255]
    image = grey_levels(mode, levels)
    if mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"mode {mode} has no fixed range"):
            to_rgb(image)
        return
    assert image.mode == mode and to_rgb(image).mode == "RGB"
    pixels = numpy.asarray(to_rgb(image)).astype(int)
    assert numpy.abs(pixels - numpy.array(levels)[None, :, None]).max() <= 3 * (mode == "LAB")
    if image.has_transparency_data:
        for opacity, far in ((0, 0), (128, 64)):  # black and white differ from what lies below
            pixels = numpy.asarray(to_rgb(grey_levels(mode, [0, 255], opacity))).astype(int)
            assert numpy.abs(numpy.abs(pixels - 128) - far).max() <= 2


@pytest.mark.parametrize("name, mode, about", [
    ("grey16.png", "I;16", {}), ("grey16.tif", "I;16", {}), ("grey16.pgm", "I;16", {}),
    ("photo.jpg", "L", {}), ("printed.jpg", "CMYK", {}), ("turned.jpg", "RGB", {})])
def test_files_of_odd_modes(tmp_path, name, mode, about):
    image = grey_levels(mode, [0, 100, 255])
    if name == "turned.jpg":
        about = {"exif": Image.Exif()}
        about["exif"][0x0112] = 6
    image.save(tmp_path / name, **about)
    pixels = numpy.asarray(read_image(tmp_path / name))[0, :, 0].astype(int)
    assert pixels.tolist() == pytest.approx([0, 100, 255], abs=12), "EXIF turns nothing"


def test_formats_that_start_programs_are_not_opened(tmp_path):
    path = tmp_path / "9.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ValueError, match="9.jpg cannot be read as an image"):
        read_image(path)


@pytest.mark.parametrize("workers, content", [(0, b"no image"), (0, "half"), (1, None)])
def test_an_unreadable_image_is_named(folder, workers, content):
    data = load_image_folder(folder, image_size=32)
    path = folder / "train" / "leaves" / "train_00001.JPEG"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:900] if content == "half" else content)
    with pytest.raises(ValueError, match=f"{path} cannot be read as an image"):
        list(ImageFolderBatches(data, workers=workers).train(4, 0, 1))


@pytest.mark.cuda
def test_on_a_gpu(data):
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state()
    on_gpu = epoch_of(data, workers=2, device="cuda")
    for (images, targets), other in zip(on_gpu, epoch_of(data), strict=True):
        assert images.is_cuda and targets.is_cuda
        torch.testing.assert_close(images.cpu(), other[0], atol=1e-6, rtol=0)
        assert torch.equal(targets.cpu(), other[1])
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_the_recipe_is_one():
    recipe = Recipe(**IMAGENET_RECIPE)
    assert [recipe.lr_in(epoch) for epoch in (1, 30)] == [0.2, 0.2]
    assert recipe.lr_in(31) == pytest.approx(0.02) and recipe.lr_in(100) == pytest.approx(0.0002)
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (100, 512, 1e-4)
