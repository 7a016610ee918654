"Images in memory: what is loaded, what is refused, and that a batch holds exactly its pixels."
import hashlib
import math
import pickle
import tarfile
import urllib.error
import urllib.request
from functools import partial
from unittest.mock import Mock

import numpy
import pytest
import torch
import torchvision.transforms.v2.functional as vision
from conftest import at_once, needs_cifar100, part_of_rank
from torchvision.datasets import CIFAR100

from sortkd.train.augmentation import (Batches, _augmented, augment_strongly, batch_bounds, crop,
                                       draw_views, normalize, pad_images, seeded_generator)
from sortkd.train.cifar import has_cifar100
from sortkd.train.images import ImageData, channel_statistics, load_cifar100, load_data, load_digits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def random_images(count, size, key="images"):
    generator = seeded_generator(key, count, size)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def toy_data(train=40, test=12, size=8, classes=4, **changes):
    fields = dict(
        name="toy", train_images=random_images(train, size),
        test_images=random_images(test, size, "test"),
        train_targets=torch.arange(train) % classes, test_targets=torch.arange(test) % classes,
        class_names=tuple(f"class {number}" for number in range(classes)),
        mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), pad=2, flip=True)
    return ImageData(**fields | changes)


@pytest.fixture
def offline(monkeypatch):
    "A network on which every request fails, and which notes whether there was one."
    urlopen = Mock(side_effect=urllib.error.URLError("the network is unreachable"))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return urlopen


@pytest.mark.parametrize("load, checksum, sizes, views", [
    (load_digits, "3834cdec9b345647258856fb597d86d80bbd6e4afaf705ce84b73050b6b6b772", [1437, 360], 25),
    pytest.param(
        partial(load_cifar100, download=False),
        "6d8a56e1b296ea821a7ce93fc720d8dca79a6fe49ba18444ebbf308887d1f041", [50000, 10000], 162,
        marks=needs_cifar100)])
def test_the_sets_are_these(load, checksum, sizes, views):
    data = load()
    assert data.checksum == checksum and data.views_per_image == views
    assert [len(data.train_images), len(data.test_images)] == sizes


def test_absent_data(tmp_path, offline):
    assert load_data(root=tmp_path).name == "digits", "auto never downloads"
    place = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=f"{place}.*SORTKD_DATA"):
        load_cifar100(place, download=False)
    assert not offline.called and not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=f"{place}.*network is unreachable.*SORTKD_DATA"):
        load_cifar100(place)
    assert offline.called and not [path for path in place.iterdir() if path.suffix != ".lock"]


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


@pytest.mark.parametrize("broken", ["train", "test", "meta"])
@pytest.mark.parametrize("how", ["byte", "missing"])
def test_damaged_files_are_refused(tmp_path, monkeypatch, offline, broken, how):
    path = tmp_path / "cifar-100-python" / broken
    fake_cifar100(path.parent, monkeypatch)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content) if how == "byte" else path.unlink()
    with pytest.raises(FileNotFoundError, match="CIFAR100 is not whole.*not found or corrupted"):
        load_cifar100(tmp_path, download=False)
    assert not offline.called


def save_archive(path, tmp_path, monkeypatch):
    pixels = fake_cifar100(tmp_path / "source" / "cifar-100-python", monkeypatch)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return torch.from_numpy(pixels).view(4, 3, 32, 32).permute(0, 2, 3, 1)


def test_download(tmp_path, monkeypatch, web):
    "From an archive behind an address to tensors, once for three that want it at the same time."
    folder, address, asked = web
    archive, root = folder / "cifar-100-python.tar.gz", tmp_path / "new" / "root"
    pixels = save_archive(archive, tmp_path, monkeypatch)
    monkeypatch.setattr(CIFAR100, "url", f"{address}/{archive.name}")
    data, *others = at_once(lambda: load_cifar100(root), 3)
    assert {each.checksum for each in others} == {data.checksum}
    assert asked.count(f"/{archive.name}") == 2, "asked once where it is, and fetched once"
    assert torch.equal(data.train_images, pixels)
    assert (data.train_targets.tolist(), data.test_targets.tolist()) == ([0, 1, 2, 3], [3, 2, 1, 0])
    (root / archive.name).unlink()
    (root / "cifar-100-python" / "test").write_bytes(b"")
    archive.write_bytes(b"please log in to this network")
    with pytest.raises(FileNotFoundError, match="not whole.*corrupted"):
        load_cifar100(root)


def test_an_archive_that_nobody_unpacked(tmp_path, monkeypatch, offline):
    "It serves, and once more where a process was killed while it unpacked."
    save_archive(tmp_path / "cifar-100-python.tar.gz", tmp_path, monkeypatch)
    assert has_cifar100(tmp_path) and len(load_data(root=tmp_path).train_images) == 4
    (tmp_path / "cifar-100-python" / "test").unlink()
    assert load_cifar100(tmp_path).num_classes == 4 and not offline.called


@pytest.mark.parametrize("changes, message", [
    (dict(train_targets=torch.arange(40)), "target of train is 39; give .* from 0 to 3"),
    (dict(test_targets=torch.tensor([-1] + [0] * 11)), "target of test is -1"),
    (dict(train_targets=torch.zeros(39, dtype=torch.int64)),
     r"train_targets is torch.int64 of shape \(39,\); give .* of shape \(40,\)"),
    (dict(train_images=torch.zeros(40, 8, 8, 3)), "train_images is torch.float32"),
    (dict(test_images=torch.zeros(12, 9, 9, 3, dtype=torch.uint8)), r"of shape \(12, 8, 8, 3\)"),
    (dict(pad=1.5), "pad is 1.5; give a whole number")])
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


@pytest.mark.parametrize("size", [1, 20])
def test_a_subset_keeps_order_and_targets(size):
    data = toy_data()
    subset = data.subset(train_size=size, seed=3)
    assert subset.checksum == data.subset(train_size=size, seed=numpy.int64(3)).checksum
    place = {image.numpy().tobytes(): number for number, image in enumerate(data.train_images)}
    chosen = [place[image.numpy().tobytes()] for image in subset.train_images]
    assert chosen == sorted(set(chosen)) and torch.equal(subset.train_targets,
                                                         data.train_targets[chosen])


def test_parts_of_parts():
    "A subset of a part keeps the true labels of its images, and all held-out images."
    part = load_data("digits(train=0:600,held_out=700:900,seed=2,noise=0.5)")
    small = part.subset(train_size=100)
    assert part.name == "digits(train=0:600,held_out=700:900,seed=2,noise=0.5)" == small.name
    assert part.wrong_labels == 300 and 30 < small.wrong_labels < 70
    assert len(small.true_train_targets) == 100
    assert small.held_out.test_images.shape == (200, 16, 16, 3)
    assert len({part.checksum, small.checksum, load_data("digits(train=0:600)").checksum}) == 3


def test_draws_depend_on_seed_and_epoch_alone():
    before = torch.get_rng_state()
    first = draw_views(300, 4, True, seed=0, epoch=1)
    toy_data().subset(train_size=4)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert torch.equal(first, draw_views(300, 4, True, numpy.int64(0), numpy.int64(1)))
    draws = {draw_views(300, 4, True, seed, epoch).numpy().tobytes()
             for seed in range(12) for epoch in range(12)}
    assert len(draws) == 144, "(0, 1), (1, 0) and all others differ"


def test_draws_are_these():
    "Records are repeatable only as long as the draw is the same in every version."
    views = draw_views(6, 4, True, seed=0, epoch=0)
    assert (views // 162).tolist() == [0, 5, 4, 2, 3, 1]
    assert (views % 162).tolist() == [56, 128, 135, 62, 59, 149]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size, pad, flip", [(32, 4, True), (16, 2, False), (8, 0, True)])
def test_crop_is_that_of_torchvision(device, size, pad, flip):
    images = random_images(50, size)
    views = draw_views(50, pad, flip, seed=2, epoch=5)
    cropped = crop(pad_images(images.to(device), pad), views, size, flip).cpu()
    assert cropped.dtype == torch.uint8 and cropped.is_contiguous()
    for image, view in zip(cropped, views.tolist()):
        index, number = divmod(view, (2 * pad + 1) ** 2 * (1 + flip))
        place, mirrored = divmod(number, 1 + flip)
        padded = vision.pad(images[index].permute(2, 0, 1), [pad] * 4)
        expected = vision.crop(padded, *divmod(place, 2 * pad + 1), size, size)
        expected = vision.horizontal_flip(expected) if mirrored else expected
        assert torch.equal(image.permute(2, 0, 1), expected)


def test_constants_made_in_inference_mode_serve_training():
    mean, std = (0.123, 0.4, 0.5), (0.2, 0.2, 0.2)  # used nowhere else, so they are made here
    with torch.inference_mode():
        normalize(random_images(2, 8), mean, std)
    weight = torch.ones(1, requires_grad=True)
    (normalize(random_images(2, 8), mean, std) * weight).sum().backward()
    assert weight.grad.isfinite().all()


def test_a_channel_that_never_varies_is_only_centred():
    images = random_images(4, 8)
    images[..., 1] = 77
    mean, std = channel_statistics(images)
    normal = normalize(images, mean, std)
    assert std[1] == 1 and normal[:, 1].abs().max() < 1e-4 and normal.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_test_batches_are_plain_and_shared(device, ranks):
    data = toy_data(test=23)
    batches = Batches(data, device)
    parts = [list(batches.test(5, part_of_rank(rank, ranks))) for rank in range(ranks)]
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
    bounds, padded = iter(batch_bounds(41, 8)), pad_images(data.train_images, data.pad)
    by_rank = [list(batches.blocks(8, 5, 2, part_of_rank(rank, ranks), steps))
               for rank in range(ranks)]
    for blocks in zip(*by_rank, strict=True):
        block = blocks[0]
        assert len(block.bounds) <= steps
        assert len(block.target) == len(block.views) == block.bounds[-1][1]
        assert block.target.device.type == device and block.views.device.type == "cpu"
        for step, (start, stop) in enumerate(block.bounds):
            begin, end = next(bounds)
            assert (block.begin + start, block.begin + stop) == (begin, end)
            views = drawn[begin:end]
            assert torch.equal(block.views[start:stop], views)
            images, targets = batches.gather(views)
            pixels = crop(padded, views, data.image_size, data.flip)
            expected = normalize(pixels, data.mean, data.std)
            torch.testing.assert_close(images.cpu(), expected, atol=1e-6, rtol=0)
            assert torch.equal(targets.cpu(), data.train_targets[views // data.views_per_image])
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(torch.cat([each.images[step] for each in blocks]), images)
            assert all(torch.equal(each.target[start:stop], targets) for each in blocks)
            parts = torch.arange(end - begin).tensor_split(ranks)
            assert [len(each.images[step]) for each in blocks] == list(map(len, parts))
    assert next(bounds, None) is None


@pytest.mark.cuda
def test_a_batch_does_not_make_the_host_wait():
    batches = Batches(toy_data(), "cuda")
    views = draw_views(40, 2, True, 0, 0).to("cuda")
    batches.gather(views)  # makes the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches.gather(views[:16])
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
        lambda: vision.equalize(image)][operation]()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", range(14))
def test_operations_are_those_of_torchvision(device, operation):
    "Every level and both signs at once, next to images of another operation."
    images = random_images(124, 16)
    level, sign = torch.arange(124) // 4, 1 - 2 * (torch.arange(124) % 2)
    kinds = torch.full((124,), operation)
    kinds[::4] = 0
    ours = _augmented(images.to(device), kinds, sign * level / 30).cpu()
    expected = torch.stack([
        by_torchvision(image.permute(2, 0, 1), *each).permute(1, 2, 0)
        for image, *each in zip(images, kinds.tolist(), level.tolist(), sign.tolist())])
    difference = (ours.int() - expected.int()).abs()
    if operation in (1, 2, 5):  # where a pixel lies between two, either is right
        assert (difference > 0).float().mean() < 0.01
    else:
        assert difference.max() <= (1 if 6 <= operation <= 9 else 0)


def test_strong_augmentation_is_this():
    "Records of MLKD and SLD are repeatable only as long as it is the same in every version."
    content = augment_strongly(random_images(200, 32), "golden", 1).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest().startswith("f3ac9798d9d48e9a")


def test_strong_images_have_a_crop_and_flip_of_their_own(monkeypatch):
    images = random_images(1, 16).clamp(min=1)
    batches = Batches(toy_data(train=1, pad=3, size=16, train_images=images))
    index = torch.zeros(3000, dtype=torch.int64)
    images = batches.strong_images(index, 5, 1, 0)
    assert torch.equal(images, batches.strong_images(index, 5, 1, 0))
    assert not torch.equal(images, batches.strong_images(index, 5, 2, 0)), "another epoch"
    monkeypatch.setattr("sortkd.train.augmentation.augment_strongly", lambda pixels, *key: pixels)
    crops = [batches.strong_images(index, 5, epoch, 0) for epoch in (1, 2)]
    assert not torch.equal(*crops), "the crops, too"
    crops, images = batches.gather(torch.arange(98))[0].flatten(1), images.flatten(1)
    found = {number for number, each in enumerate(crops)
             if (images == each).float().mean(1).max() > 0.9}
    assert len(found) > 50, "many of the 98 crops, plain and mirrored, are nearly unchanged"
    assert {number % 2 for number in found} == {0, 1}


@needs_cifar100
def test_the_normalization_of_cifar100_is_that_of_its_images():
    data = load_cifar100()
    for known, found in zip((data.mean, data.std), channel_statistics(data.train_images)):
        assert [*known] == pytest.approx([*found], abs=4e-4)  # as the field has it


def test_copies_of_one_image_become_different():
    strong = augment_strongly(random_images(1, 32).repeat(2000, 1, 1, 1), 0)
    assert len(strong.flatten(1).unique(dim=0)) > 1900
    assert augment_strongly(strong[:0], 0).shape == (0, 32, 32, 3)
