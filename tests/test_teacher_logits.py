"The kept logits are the teacher's, whatever happens to them on the way."
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import needs_cifar100

from sortkd.train.augmentation import Batches, draw_views, view_id, views_of
from sortkd.train.images import load_cifar100, load_digits
from sortkd.utils.files import exclusive
from sortkd.train.networks import create_model
from sortkd.train.teacher_logits import CachedTeacherLogits, TeacherLogits
from sortkd.train.teachers import load_teacher


def seeded_network(seed=0, classes=10):
    torch.manual_seed(seed)
    return create_model("resnet8", classes)


@pytest.fixture(scope="module")
def batches():
    return Batches(load_digits().subset(train_size=120))


def views(epoch=1, seed=0, count=120):
    return draw_views(count, 2, False, seed, epoch)


class Counting:
    "How many rows a network has seen."
    def __init__(self, network):
        self.rows = 0
        network.register_forward_hook(self.add)

    def add(self, network, arguments, output):
        self.rows += len(output)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_view_has_the_same_logits(batches, tmp_path, precision):
    network = seeded_network()
    plain, cache = TeacherLogits(network, batches, precision, batch_size=64), CachedTeacherLogits(network, batches, tmp_path, precision, batch_size=50)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 7, 300, 300):  # in any number and order, with repetitions
        index = torch.randint(120, (count,), generator=generator)
        asked = views_of(index, torch.randint(25, (count,), generator=generator), 2, False)
        images, _ = batches.gather(asked)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            directly = network(images).float()
        kept = cache(asked)
        assert kept.dtype == torch.float32 and kept.shape == (count, 10)
        tolerance = {"atol": 1e-5 * directly.abs().max(), "rtol": 2**-11} if precision == "float32" else {"atol": 0.05 * directly.std(), "rtol": 0}
        torch.testing.assert_close(kept, directly, **{key: float(value) for key, value in tolerance.items()})
        torch.testing.assert_close(kept, plain(asked), **{key: float(value) for key, value in tolerance.items()})


@needs_cifar100
def test_the_same_view_has_the_same_logits_on_cifar100(tmp_path):
    data = load_cifar100().subset(train_size=100)
    teacher = load_teacher(os.path.join(os.path.dirname(__file__), "../teachers/resnet20-cifar100-30epochs.safetensors"), "resnet20", 100).model
    batches = Batches(data)
    cache = CachedTeacherLogits(teacher, batches, tmp_path)
    for epoch in (1, 2):
        asked = draw_views(100, 4, True, 0, epoch)
        cache(asked)
    assert torch.equal(cache(asked), TeacherLogits(teacher, batches)(asked).half().float())
    assert cache.bytes == 100 * 162 * 100 * 2 and cache.share_computed == pytest.approx(1 - (1 - 1 / 162) ** 2, rel=0.01)


def test_no_view_is_computed_twice(batches, tmp_path):
    network = seeded_network()
    cache = CachedTeacherLogits(network, batches, tmp_path)
    counting, padding = Counting(network), 32 * 9  # for each time that some are missing, and for the rest of a `fill`
    for epoch in (1, 2, 3):
        cache(views(epoch))
    asked = torch.cat([views(epoch).index * 25 + view_id(views(epoch), 2, False) for epoch in (1, 2, 3)])
    assert len(asked.unique()) <= counting.rows < len(asked.unique()) + padding
    seen = counting.rows
    for epoch in (3, 1, 2):
        cache(views(epoch))
    assert counting.rows == seen
    before = round(cache.share_computed * 3000)
    cache.fill()
    assert cache.share_computed == 1 and 3000 - before <= counting.rows - seen < 3000 - before + padding
    seen = counting.rows
    cache.fill()
    assert counting.rows == seen


def test_another_process_goes_on_where_a_killed_one_stopped(batches, tmp_path):
    code = ("import os, signal, sys, torch\nfrom sortkd.train.images import Batches, draw_views, load_digits\nfrom sortkd.train.networks import create_model\nfrom sortkd.train.teacher_logits import CachedTeacherLogits\n"
            "torch.set_num_threads(1); torch.manual_seed(0)\n"
            "cache = CachedTeacherLogits(create_model('resnet8', 10), Batches(load_digits().subset(train_size=120)), sys.argv[1], batch_size=16)\n"
            "cache(draw_views(120, 2, False, 0, 1)); cache.close()\n"
            "cache(draw_views(120, 2, False, 0, 2))\n"  # and not closed
            "os.kill(os.getpid(), signal.SIGKILL)\n")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    network = seeded_network()
    cache = CachedTeacherLogits(network, batches, tmp_path)
    asked = torch.cat([each.index * 25 + view_id(each, 2, False) for each in (views(1), views(2))])
    assert cache.share_computed == len(asked.unique()) / 3000
    counting = Counting(network)
    found = [cache(views(epoch)) for epoch in (1, 2)]
    assert counting.rows == 0
    for epoch, kept in enumerate(found, 1):
        assert torch.equal(kept, TeacherLogits(network, batches)(views(epoch)).half().float())


def test_one_process_fills_and_others_wait(batches, tmp_path, capfd):
    first, network = CachedTeacherLogits(seeded_network(), batches, tmp_path), seeded_network()
    second, said = CachedTeacherLogits(network, batches, tmp_path), ""
    counting = Counting(network)
    with ThreadPoolExecutor(1) as pool:
        with exclusive(first.folder / "fill.lock", "filling"):
            waiting = pool.submit(second.fill)
            while "waiting for it" not in said and not waiting.done():
                said += capfd.readouterr().out
            first(first._views(torch.arange(3000)))
            first.close()
        waiting.result()
    assert "waiting for it" in said and counting.rows == 0 and second.share_computed == 1


@pytest.mark.slow
def test_several_processes_fill_one_cache(batches, tmp_path):
    code = ("import sys, torch\nfrom sortkd.train.images import Batches, load_digits\nfrom sortkd.train.networks import create_model\nfrom sortkd.train.teacher_logits import CachedTeacherLogits\n"
            "torch.set_num_threads(1); torch.manual_seed(0)\n"
            "cache = CachedTeacherLogits(create_model('resnet8', 10), Batches(load_digits().subset(train_size=120)), sys.argv[1], batch_size=16)\n"
            "for rows in torch.arange(3000).split(100): cache(cache._views(rows))\n"
            "cache.close()\n")
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert all(writer.wait() == 0 for writer in writers)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    network = seeded_network()
    cache = CachedTeacherLogits(network, batches, tmp_path)
    everything = cache._views(torch.arange(3000))
    assert cache.share_computed == 1 and torch.equal(cache(everything), TeacherLogits(network, batches)(everything).half().float())


def test_other_teachers_images_and_arithmetic_have_other_caches(batches, tmp_path):
    from dataclasses import replace
    data = batches.data
    changed = data.train_images.clone()
    changed[5, 3, 3, 1] += 1
    variants = [(seeded_network(), batches, "float32"), (seeded_network(1), batches, "float32"), (seeded_network(), batches, "bfloat16"),
                (seeded_network(), Batches(replace(data, train_images=changed)), "float32"),
                (seeded_network(), Batches(replace(data, mean=(0.5, 0.5, 0.5))), "float32"), (seeded_network(), Batches(replace(data, pad=1)), "float32"),
                (seeded_network(), Batches(replace(data, flip=True)), "float32")]
    folders = [CachedTeacherLogits(network, its_batches, tmp_path, precision).folder for network, its_batches, precision in variants]
    assert len(set(folders)) == len(variants)
    assert CachedTeacherLogits(seeded_network(), Batches(data.subset(test_size=50)), tmp_path).folder == folders[0]  # test images do not matter


def test_a_renamed_cache_is_refused(batches, tmp_path):
    one, two = (CachedTeacherLogits(seeded_network(seed), batches, tmp_path / str(seed)) for seed in (0, 1))
    one(views())
    one.close()
    for path in one.folder.iterdir():
        path.rename(two.folder / path.name)
    with pytest.raises(ValueError, match="stored logits differ from the teacher's"):
        CachedTeacherLogits(seeded_network(1), batches, tmp_path / "1")


def replaced(content, start, stop, what):
    return content[:start] + what(content[start:stop]) + content[stop:]


DAMAGE = {  # to 8,000 bytes of logits and their checksums, of ten classes: 400 rows
    "a page of zeros": ("logits.bin", lambda old: replaced(old, 0, 4096, lambda part: bytes(len(part)))),
    "all zeros": ("logits.bin", lambda old: bytes(len(old))),
    "NaN": ("logits.bin", lambda old: replaced(old, 2000, 2002, lambda part: b"\x00\x7e")),
    "infinity": ("logits.bin", lambda old: replaced(old, 2000, 2002, lambda part: b"\x00\x7c")),
    "one bit": ("logits.bin", lambda old: replaced(old, 7001, 7002, lambda part: bytes([part[0] ^ 1]))),
    "two rows exchanged": ("logits.bin", lambda old: replaced(old, 2000, 2040, lambda part: part[20:] + part[:20])),
    "two classes exchanged": ("logits.bin", lambda old: replaced(old, 2000, 2004, lambda part: part[2:] + part[:2])),
    "a bit of a checksum": ("checksums.bin", lambda old: replaced(old, 400, 401, lambda part: bytes([part[0] ^ 128]))),
    "checksums of zeros": ("checksums.bin", lambda old: bytes(len(old))),
}


@pytest.mark.parametrize("open_then", [False, True], ids=["before it is opened", "while it is open"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_rows_are_computed_again(tmp_path, capsys, damage, open_then):
    batches = Batches(load_digits().subset(train_size=16))
    one, asked = CachedTeacherLogits(seeded_network(), batches, tmp_path), torch.arange(400)
    expected = one(one._views(asked))
    one.close()
    name, change = DAMAGE[damage]
    content = (one.folder / name).read_bytes()
    assert change(content) != content and len(change(content)) == len(content)
    with open(one.folder / name, "r+b") as file:
        file.write(change(content))
    cache = one if open_then else CachedTeacherLogits(seeded_network(), batches, tmp_path)
    for _ in range(2):
        assert torch.equal(cache(cache._views(asked)), expected)
    said = capsys.readouterr().out
    if damage != "checksums of zeros":
        assert said.count(f"{cache.folder} is damaged: ") == said.count("\n") == 1 and "computed again" in said
    assert CachedTeacherLogits(seeded_network(), batches, tmp_path).share_computed == 1 and not capsys.readouterr().out


@pytest.mark.parametrize("damage", ["short", "missing"])
def test_files_of_another_size_are_refused(batches, tmp_path, damage):
    logits = CachedTeacherLogits(seeded_network(), batches, tmp_path).folder / "logits.bin"
    logits.write_bytes(logits.read_bytes()[:-2]) if damage == "short" else logits.unlink()
    with pytest.raises(ValueError, match=str(logits)):
        CachedTeacherLogits(seeded_network(), batches, tmp_path)


def test_a_cache_without_checksums_is_not_used(batches, tmp_path, capsys):
    "As earlier versions made it."
    from sortkd.train.teacher_logits import _identity, _key
    identity = _identity(TeacherLogits(seeded_network(), batches), batches.data)
    earlier = tmp_path / _key(identity | {"format": 1})
    earlier.mkdir()
    (earlier / "logits.bin").write_bytes(bytes(3000 * 20))
    (earlier / "computed.bin").write_bytes(b"\1" * 3000)
    for said in (f"{earlier} is a cache of an earlier version", ""):
        network = seeded_network()
        cache = CachedTeacherLogits(network, batches, tmp_path)
        assert torch.equal(cache(views()), TeacherLogits(network, batches)(views()).half().float())
        out = capsys.readouterr().out
        assert out.startswith(said) and bool(out) == bool(said)


def test_logits_beyond_half_precision_are_refused(batches, tmp_path):
    network = seeded_network()
    with torch.no_grad():
        network.classifier_layer.weight.mul_(1e8)
    with pytest.raises(ValueError, match="half precision.*cache='off'"):
        CachedTeacherLogits(network, batches, tmp_path)(views())


def test_a_full_disk_is_an_error_before_anything_is_computed(batches, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match="0.00 GB.*cache='off'"):
            CachedTeacherLogits(seeded_network(), batches, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.cuda
def test_on_a_gpu(tmp_path):
    batches = Batches(load_digits().subset(train_size=120), "cuda")
    network = seeded_network()
    cache, plain = CachedTeacherLogits(network, batches, tmp_path), TeacherLogits(network, batches)
    for _ in range(2):
        assert cache(views()).is_cuda
        torch.testing.assert_close(cache(views()), plain(views()), rtol=2e-3, atol=1e-3)
    cache.close()
    again = CachedTeacherLogits(network, batches, tmp_path)
    assert torch.equal(again(views()), cache(views()))
