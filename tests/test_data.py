"Images in memory: what is loaded, what is refused, and that a batch holds exactly its pixels."

import functools
import hashlib
import http.server
import math
import pickle
import shutil
import socket
import tarfile
import threading
import urllib.error
import urllib.request

import numpy
import pytest
import torch
import torchvision.transforms.v2.functional as vision
from conftest import needs_cifar100
from torchvision.datasets import CIFAR10, CIFAR100

import sortkd.train.augmentation
from sortkd.train.augmentation import augment_strongly
from sortkd.train.augmentation import (
    Batches, batch_bounds, crop, draw_views, normalize, pad_images, seeded_generator, view_id,
    views_of,
)
from sortkd.train.images import ImageData, load_cifar100, load_data, load_digits
from sortkd.train.cifar import has_cifar100

CIFAR_FILES = ("train", "test", "meta")
DIGITS_CHECKSUM = "3834cdec9b345647258856fb597d86d80bbd6e4afaf705ce84b73050b6b6b772"
CIFAR_CHECKSUM = "6d8a56e1b296ea821a7ce93fc720d8dca79a6fe49ba18444ebbf308887d1f041"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def random_images(count, size, key="images"):
    generator = seeded_generator(key, count, size)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def toy_data(train=40, test=12, size=8, classes=4, **changes):
    fields = dict(
        name="toy", train_images=random_images(train, size),
        train_targets=torch.arange(train) % classes,
        test_images=random_images(test, size, "test"), test_targets=torch.arange(test) % classes,
        class_names=tuple(f"class {number}" for number in range(classes)),
        mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), pad=2, flip=True,
    )
    return ImageData(**fields | changes)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def files_in(folder):
    "What is in a folder beside the lock, which is empty and stays."
    names = {path.name for path in folder.iterdir()} - {".cifar-100-python.lock"}
    return sorted(names)


@pytest.fixture
def offline(monkeypatch):
    "A network on which every request fails; the list that it returns collects the requests."
    requests = []

    def refuse(request, *args, **kwargs):
        requests.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("the network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return requests


# The data sets


def test_digits(digits):
    assert digits.checksum == DIGITS_CHECKSUM
    assert digits.train_images.shape == (1437, 16, 16, 3) and len(digits.test_images) == 360
    assert (digits.num_classes, digits.image_size, digits.pad, digits.flip) == (10, 16, 2, False)
    pixels = normalize(digits.train_images, digits.mean, digits.std)
    assert abs(pixels.mean()) < 1e-3 and abs(pixels.std() - 1) < 1e-3
    assert load_data("digits").checksum == digits.checksum


def test_cifar100():
    data = load_cifar100(download=False)
    assert data.checksum == CIFAR_CHECKSUM
    assert data.train_images.shape == (50000, 32, 32, 3) and len(data.test_images) == 10000
    assert torch.bincount(data.train_targets).tolist() == [500] * 100
    assert torch.bincount(data.test_targets).tolist() == [100] * 100
    assert data.class_names[0] == "apple" and data.class_names[99] == "worm"
    assert data.train_images.is_contiguous() and data.views_per_image == 162
    subset = data.subset(train_size=250, test_size=100)
    assert set(torch.bincount(subset.train_targets, minlength=100).tolist()) == {2, 3}
    assert torch.bincount(subset.test_targets, minlength=100).tolist() == [1] * 100


@pytest.mark.parametrize("name", ["cifar11", "CIFAR100", "", None, "folder:"])
def test_unknown_data(name):
    with pytest.raises(ValueError, match=f"the data set is {name!r}; choose one of auto, "):
        load_data(name)


def test_auto_never_downloads(tmp_path, offline):
    assert load_data(root=tmp_path).name == "digits"
    assert not offline and not list(tmp_path.iterdir())


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    (tmp_path / "cifar-100-python").mkdir()
    monkeypatch.setenv("SORTKD_DATA", str(tmp_path))
    assert has_cifar100() and not has_cifar100(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SORTKD_DATA", "")
    assert not has_cifar100()
    shutil.move("cifar-100-python", (tmp_path / "data").mkdir() or tmp_path / "data")
    monkeypatch.delenv("SORTKD_DATA")
    assert has_cifar100()


# Files that are absent or damaged


def test_absent(tmp_path, offline):
    place = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=f"{place}.*SORTKD_DATA"):
        load_cifar100(place, download=False)
    assert not offline and not place.exists()
    with pytest.raises(FileNotFoundError, match=f"{place}.*network is unreachable.*SORTKD_DATA"):
        load_cifar100(place)
    assert offline and files_in(place) == [], "a failed download leaves nothing behind"


def fake_cifar100(folder, monkeypatch):
    "Four images in CIFAR-100's format at `folder`, which torchvision takes for the published ones."
    folder.mkdir(parents=True)
    pixels = numpy.arange(4 * 3072, dtype=numpy.uint8).reshape(4, 3072)
    contents = {"train": {"data": pixels, "fine_labels": [0, 1, 2, 3]},
                "test": {"data": pixels, "fine_labels": [3, 2, 1, 0]},
                "meta": {"fine_label_names": list("abcd")}}
    md5 = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    return pixels


@pytest.mark.parametrize("broken", CIFAR_FILES)
@pytest.mark.parametrize("how", ["byte", "truncated", "missing"])
def test_damaged_files_are_refused(tmp_path, monkeypatch, offline, broken, how):
    path = tmp_path / "cifar-100-python" / broken
    fake_cifar100(path.parent, monkeypatch)
    content = bytearray(path.read_bytes())
    content[-5] ^= how == "byte"
    path.write_bytes(content[:-5] if how == "truncated" else content)
    if how == "missing":
        path.unlink()
    problem = "missing" if how == "missing" else "damaged"
    with pytest.raises(ValueError, match=f"{broken} is {problem}.*Delete the folder"):
        load_cifar100(tmp_path)
    assert not offline


@needs_cifar100
def test_the_constants_of_the_recipe(tmp_path, monkeypatch):
    "Of the published teachers: exchanged digits would show in no other number of a run."
    fake_cifar100(tmp_path / "cifar-100-python", monkeypatch)
    data = load_cifar100(tmp_path)
    assert (data.mean, data.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


# Downloads


@pytest.fixture
def web(tmp_path, monkeypatch):
    "A folder and the address at which a server on this machine offers its files."
    folder = tmp_path / "web"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def save_archive(path, tmp_path, monkeypatch):
    pixels = fake_cifar100(tmp_path / "source" / "cifar-100-python", monkeypatch)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return torch.from_numpy(pixels).view(4, 3, 32, 32).permute(0, 2, 3, 1)


def test_download(tmp_path, monkeypatch, web):
    "The whole way, from an archive behind an address to tensors."
    folder, address = web
    archive = folder / "cifar-100-python.tar.gz"
    pixels = save_archive(archive, tmp_path, monkeypatch)
    monkeypatch.setattr(CIFAR100, "url", f"{address}/{archive.name}")
    root = tmp_path / "new" / "root"
    data = load_cifar100(root)
    assert files_in(root) == ["cifar-100-python"], "nothing but the data is left"
    assert torch.equal(data.train_images, pixels)
    assert (data.train_targets.tolist(), data.test_targets.tolist()) == ([0, 1, 2, 3], [3, 2, 1, 0])
    archive.unlink()
    assert load_cifar100(root).checksum == data.checksum, "the second call downloads nothing"


def test_download_of_something_else(tmp_path, monkeypatch, web):
    folder, address = web
    (folder / "page.tar.gz").write_bytes(b"please log in to this network")
    monkeypatch.setattr(CIFAR100, "url", f"{address}/page.tar.gz")
    with pytest.raises(FileNotFoundError, match="could not be downloaded.*corrupted"):
        load_cifar100(tmp_path / "new")
    assert files_in(tmp_path / "new") == []


def test_an_archive_that_nobody_unpacked(tmp_path, monkeypatch, offline):
    archive, other = (tmp_path / f"cifar-{count}-python.tar.gz" for count in (100, 10))
    save_archive(archive, tmp_path, monkeypatch)
    other.write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match=f"MD5 is not the published {CIFAR10.tgz_md5}"):
        load_data("cifar10", tmp_path)
    assert other.is_file() and not offline, "the user's archive stays"
    assert has_cifar100(tmp_path) and len(load_data(root=tmp_path).train_images) == 4
    assert archive.is_file() and not offline
    shutil.rmtree(tmp_path / "cifar-100-python")
    assert load_cifar100(tmp_path, download=False).num_classes == 4, "unpacking is not a download"


def test_download_has_a_time_limit(tmp_path, monkeypatch):
    limits = []

    def stall(*args, **kwargs):
        limits.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", stall)
    before = socket.getdefaulttimeout()
    with pytest.raises(FileNotFoundError, match="timed out"):
        load_cifar100(tmp_path)
    assert 0 < limits[0] <= 60 and socket.getdefaulttimeout() == before


# ImageData


@pytest.mark.parametrize("changes, message", [
    (dict(train_targets=torch.arange(40)), "train_targets holds 4; give numbers from 0 to 3"),
    (dict(test_targets=torch.tensor([-1] + [0] * 11)), "test_targets holds -1"),
    (dict(train_targets=torch.zeros(39, dtype=torch.int64)),
     r"train_targets is torch.int64 of shape \(39,\); give .* of shape \(40,\)"),
    (dict(train_targets=torch.zeros(40, dtype=torch.int32)), "train_targets is torch.int32"),
    (dict(train_images=torch.zeros(40, 8, 8, 3)), "train_images is torch.float32"),
    (dict(train_images=torch.zeros(40, 3, 8, 8, dtype=torch.uint8)), r"of shape \(40, 3, 8, 8\)"),
    (dict(train_images=torch.zeros(0, 8, 8, 3, dtype=torch.uint8)), "train_images is .*not empty"),
    (dict(test_images=torch.zeros(12, 9, 9, 3, dtype=torch.uint8)), r"of shape \(12, 8, 8, 3\)"),
    (dict(mean=(0.5,)), r"mean is \(0\.5,\); give three numbers"),
    (dict(std=(0.2, 0.0, 0.2)), "std is 0.0; give a finite number above 0"),
    (dict(pad=1.5), "pad is 1.5; give a whole number"),
    (dict(class_names=("one",)), "give at least two classes"),
])
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        toy_data(**changes)


def test_checksum_names_the_data():
    data = toy_data()
    assert len(data.checksum) == 64 and data.checksum == toy_data(name="other").checksum
    for name in ("train_images", "train_targets", "test_images", "test_targets"):
        tensor = getattr(data, name).clone()
        tensor.view(-1)[5] = (tensor.view(-1)[5] + 1) % 4
        assert toy_data(**{name: tensor}).checksum != data.checksum, name
    assert "train_images" not in repr(data) and data.checksum[:12] in repr(data)


@pytest.mark.parametrize("size", [1, 3, 20, 40])
def test_subset_is_balanced_deterministic_and_nested(size):
    data = toy_data()
    subset = data.subset(train_size=size, seed=3)
    counts = torch.bincount(subset.train_targets, minlength=4)
    assert counts.sum() == size and counts.max() - counts.min() <= 1
    assert len(subset.test_images) == len(data.test_images)
    assert subset.checksum == data.subset(train_size=size, seed=numpy.int64(3)).checksum
    place = {image.numpy().tobytes(): number for number, image in enumerate(data.train_images)}
    chosen = [place[image.numpy().tobytes()] for image in subset.train_images]
    assert chosen == sorted(set(chosen)), "in the order of the whole set, each once"
    assert torch.equal(subset.train_targets, data.train_targets[chosen])
    if size < 40:
        larger = data.subset(train_size=size + 1, seed=3)
        assert set(chosen) < {place[image.numpy().tobytes()] for image in larger.train_images}
        assert subset.checksum != data.subset(train_size=size, seed=4).checksum


@pytest.mark.parametrize("sizes, message", [
    (dict(train_size=41), "train_size is 41, but toy has 40 train images"),
    (dict(test_size=-1), "test_size is -1; give"), (dict(train_size="10"), "train_size is '10'"),
    (dict(train_size=4, seed=-1), "seed is -1; give"),
])
def test_subset_sizes_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        toy_data().subset(**sizes)


def test_parts_of_parts():
    "A subset of a part keeps the true labels of its images, and all held-out images."
    part = load_data("digits(train=0:600,held_out=700:900,seed=2,noise=0.5)")
    small = part.subset(train_size=100)
    assert part.name == "digits(train=0:600,held_out=700:900,seed=2,noise=0.5)" == small.name
    assert part.wrong_labels == 300 and 30 < small.wrong_labels < 70
    assert len(small.true_train_targets) == 100
    assert small.held_out.test_images.shape == (200, 16, 16, 3)
    assert len({part.checksum, small.checksum, load_data("digits(train=0:600)").checksum}) == 3


# Crops


def test_draws_depend_on_seed_and_epoch_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = draw_views(300, 4, True, seed=0, epoch=1)
    toy_data().subset(train_size=4)
    assert torch.equal(torch.rand(3), expected), "the global generator is left alone"
    assert all(map(torch.equal, first, draw_views(300, 4, True, seed=0, epoch=1)))
    assert all(map(torch.equal, first, draw_views(300, 4, True, numpy.int64(0), numpy.int64(1))))
    draws = {draw_views(300, 4, True, seed, epoch).index.numpy().tobytes()
             for seed in range(12) for epoch in range(12)}
    assert len(draws) == 144, "(0, 1), (1, 0) and all others differ"


def test_draws_are_these():
    "Records are repeatable only as long as the draw is the same in every version."
    views = draw_views(6, 4, True, seed=0, epoch=0)
    assert views.index.tolist() == [0, 5, 4, 2, 3, 1]
    assert view_id(views, 4, True).tolist() == [56, 128, 135, 62, 59, 149]


# Pixels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size, pad, flip", [(32, 4, True), (16, 2, False), (8, 0, True)])
def test_crop_is_that_of_torchvision(device, size, pad, flip):
    images = random_images(50, size)
    views = draw_views(50, pad, flip, seed=2, epoch=5)
    cropped = crop(pad_images(images.to(device), pad), views, size).cpu()
    assert cropped.dtype == torch.uint8 and cropped.is_contiguous()
    for image, index, top, left, mirrored in zip(cropped, *(each.tolist() for each in views)):
        padded = vision.pad(images[index].permute(2, 0, 1), [pad] * 4)
        expected = vision.crop(padded, top, left, size, size)
        expected = vision.horizontal_flip(expected) if mirrored else expected
        assert torch.equal(image.permute(2, 0, 1), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_normalize(device):
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 2, 2, 3)
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    normalized = normalize(images.to(device), mean, std)
    expected = vision.normalize(images.permute(0, 3, 1, 2).double() / 255, mean, std)
    assert (normalized.cpu().double() - expected).abs().max() < 1e-6
    assert normalized.dtype == torch.float32 and normalized.shape == (256, 3, 2, 2)
    assert normalized.is_contiguous(memory_format=torch.channels_last)


def test_constants_made_in_inference_mode_serve_training():
    mean, std = (0.123, 0.4, 0.5), (0.2, 0.2, 0.2)  # used nowhere else, so they are made here
    with torch.inference_mode():
        normalize(random_images(2, 8), mean, std)
    weight = torch.ones(1, requires_grad=True)
    (normalize(random_images(2, 8), mean, std) * weight).sum().backward()
    assert weight.grad.isfinite().all()


# Batches


@pytest.mark.parametrize("num_images, batch_size, sizes", [
    (10, 5, [5, 5]), (10, 4, [4, 4, 2]), (9, 4, [4, 5]), (3, 1, [1, 1, 1]), (1, 8, [1]),
    (9, 8, [9]), (5, 100, [5]), (3, 2, [3]),
])
def test_batch_bounds(num_images, batch_size, sizes):
    bounds = batch_bounds(num_images, batch_size)
    assert [stop - start for start, stop in bounds] == sizes
    rows = [index for start, stop in bounds for index in range(start, stop)]
    assert rows == list(range(num_images))


@pytest.mark.parametrize("device", DEVICES)
def test_training_batches(device):
    data = toy_data(train=41)
    batches = Batches(data, device)
    list(batches.train(8, seed=5, epoch=1))
    seen = list(batches.train(8, seed=5, epoch=2))
    assert [len(targets) for _, targets, _ in seen] == [8, 8, 8, 8, 9]
    drawn = draw_views(41, data.pad, data.flip, seed=5, epoch=2)
    for part, tensor in enumerate(drawn):
        assert torch.equal(torch.cat([views[part] for _, _, views in seen]), tensor)
    pixels = crop(pad_images(data.train_images, data.pad), drawn, data.image_size)
    images, targets = (torch.cat(parts).cpu() for parts in list(zip(*seen))[:2])
    torch.testing.assert_close(images, normalize(pixels, data.mean, data.std), atol=1e-6, rtol=0)
    assert torch.equal(targets, data.train_targets[drawn.index])
    for images, targets, views in seen:
        assert images.device.type == targets.device.type == device
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_test_batches_are_plain_and_shared(device, ranks):
    data = toy_data(test=23)
    batches = Batches(data, device)
    parts = [list(batches.test(5, rank, ranks)) for rank in range(ranks)]
    expected = vision.normalize(data.test_images.permute(0, 3, 1, 2).double() / 255,
                                data.mean, data.std)
    for number, bounds in enumerate(batch_bounds(23, 5)):
        images, targets = (torch.cat([part[number][place] for part in parts]) for place in (0, 1))
        rows, images = slice(*bounds), images.cpu().double()
        torch.testing.assert_close(images, expected[rows], atol=1e-6, rtol=0)
        assert torch.equal(targets.cpu(), data.test_targets[rows])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps, ranks", [(1, 1), (3, 1), (32, 1), (3, 2), (2, 5)])
def test_blocks_hold_the_batches(device, steps, ranks):
    "Rows, targets, views and images of each step, as an epoch drawn by hand has them."
    data = toy_data(train=41)
    batches, drawn = Batches(data, device), draw_views(41, data.pad, data.flip, 5, 2)
    bounds = iter(batch_bounds(41, 8))
    by_rank = [list(batches.blocks(8, 5, 2, rank=rank, ranks=ranks, steps=steps))
               for rank in range(ranks)]
    for blocks in zip(*by_rank, strict=True):
        block = blocks[0]
        assert len(block.bounds) <= steps
        assert len(block.target) == len(block.views.index) == block.bounds[-1][1]
        assert block.target.device.type == device and block.views.index.device.type == "cpu"
        for step, (start, stop) in enumerate(block.bounds):
            begin, end = next(bounds)
            assert (block.begin + start, block.begin + stop) == (begin, end)
            assert all(map(torch.equal, block.views.part(start, stop), drawn.part(begin, end)))
            images, targets = batches.gather(drawn.part(begin, end))
            assert torch.equal(torch.cat([each.images(step) for each in blocks]), images)
            assert all(torch.equal(each.target[start:stop], targets) for each in blocks)
            parts = torch.arange(end - begin).tensor_split(ranks)
            assert [len(each.images(step)) for each in blocks] == list(map(len, parts))
    assert next(bounds, None) is None


@pytest.mark.cuda
def test_a_batch_does_not_make_the_host_wait():
    batches = Batches(toy_data(), "cuda")
    views = draw_views(40, 2, True, 0, 0).to("cuda")
    batches.gather(views)  # makes the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches.gather(views.part(0, 16))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Strong augmentation


def by_torchvision(image, operation, level, sign):
    "One operation of RandAugment on one image (3, H, W)."
    amount, shift = sign * level / 30, int(150 / 331 * image.shape[2] * sign * level / 30)
    shear = math.degrees(math.atan(0.3 * amount))
    return [
        lambda: image,
        lambda: vision.affine(image, 0.0, [0, 0], 1.0, [shear, 0.0], center=[0, 0]),
        lambda: vision.affine(image, 0.0, [0, 0], 1.0, [0.0, shear], center=[0, 0]),
        lambda: vision.affine(image, 0.0, [shift, 0], 1.0, [0.0, 0.0]),
        lambda: vision.affine(image, 0.0, [0, shift], 1.0, [0.0, 0.0]),
        lambda: vision.rotate(image, 30 * amount),
        lambda: vision.adjust_brightness(image, 1 + 0.9 * amount),
        lambda: vision.adjust_saturation(image, 1 + 0.9 * amount),
        lambda: vision.adjust_contrast(image, 1 + 0.9 * amount),
        lambda: vision.adjust_sharpness(image, 1 + 0.9 * amount),
        lambda: vision.posterize(image, 8 - round(level * 4 / 30)),
        lambda: vision.solarize(image, 255 * (1 - level / 30)),
        lambda: vision.autocontrast(image),
        lambda: vision.equalize(image),
    ][operation]()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", range(14))
def test_operations_are_those_of_torchvision(device, operation):
    "Every level and both signs at once, next to images of another operation."
    images = random_images(124, 16)
    level, sign = torch.arange(124) // 4, 1 - 2 * (torch.arange(124) % 2)
    kinds = torch.full((124,), operation)
    kinds[::4] = 0
    ours = sortkd.train.augmentation._augmented(images.to(device), kinds, sign * level / 30).cpu()
    expected = torch.stack([
        by_torchvision(image.permute(2, 0, 1), *each).permute(1, 2, 0)
        for image, *each in zip(images, kinds.tolist(), level.tolist(), sign.tolist())])
    difference = (ours.int() - expected.int()).abs()
    if operation in (1, 2, 5):  # where a pixel lies between two, either is right
        assert (difference > 0).float().mean() < 0.01
    else:
        assert difference.max() <= (1 if 6 <= operation <= 9 else 0)


@pytest.mark.parametrize("device", DEVICES)
def test_strong_augmentation_is_drawn_for_each_image(device):
    images = random_images(1, 32).repeat(2000, 1, 1, 1).to(device)
    before, state = images.clone(), torch.random.get_rng_state()
    strong, again, other = (augment_strongly(images, 0, epoch) for epoch in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"
    assert torch.equal(images, before) and strong.dtype == torch.uint8
    assert torch.equal(strong, again) and not torch.equal(strong, other)
    assert strong.device == images.device and strong.shape == images.shape
    assert len(strong.flatten(1).unique(dim=0)) > 1900, "copies of one image become different"
    assert augment_strongly(images[:0], 0).shape == (0, 32, 32, 3)


def test_strong_augmentation_is_this():
    "Records of MLKD and SLD are repeatable only as long as it is the same in every version."
    content = augment_strongly(random_images(200, 32), "golden", 1).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest().startswith("f3ac9798d9d48e9a")


def test_squares_are_grey_and_of_up_to_half_the_side():
    sizes, middles = [], []
    for picture in augment_strongly(torch.zeros(4000, 32, 32, 3, dtype=torch.uint8), "squares"):
        # black images stay black, unless solarised or sharpened
        if (picture == 0).any() and (picture == 127).any():
            rows, columns = (picture == 127).all(2).nonzero().T
            sizes.append((rows.max() - rows.min() + 1).item())
            middles.append((rows.float().mean().item(), columns.float().mean().item()))
            width = columns.max() - columns.min() + 1
            assert len(rows) == sizes[-1] * width, "a square, or what the border leaves of it"
    assert len(sizes) > 2000 and 15 <= max(sizes) <= 16 and min(sizes) == 1
    assert all(abs(torch.tensor(each).mean() - 16) < 1.5 for each in zip(*middles))


def test_strong_images_have_a_crop_and_flip_of_their_own():
    images = random_images(1, 16).clamp(min=1)
    batches = Batches(toy_data(train=1, pad=3, size=16, train_images=images))
    index = torch.zeros(3000, dtype=torch.int64)
    images = batches.strong_images(index, 5, 1, 0)
    assert torch.equal(images, batches.strong_images(index, 5, 1, 0))
    assert not torch.equal(images, batches.strong_images(index, 5, 2, 0)), "another epoch"
    every = views_of(torch.zeros(98, dtype=torch.int64), torch.arange(98), 3, True)
    crops, images = batches.gather(every)[0].flatten(1), images.flatten(1)
    found = {number for number, each in enumerate(crops)
             if (images == each).float().mean(1).max() > 0.9}
    assert len(found) > 50, "many of the 98 crops, plain and mirrored, are nearly unchanged"
    assert {number % 2 for number in found} == {0, 1}
