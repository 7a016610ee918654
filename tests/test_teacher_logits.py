"Cached logits are the teacher's, whatever happens to their files and whoever computes them."
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import full_disk, seeded_network
from faults import context

from sortkd.train.augmentation import Batches, draw_views
from sortkd.train.images import load_digits
from sortkd.train.teacher_logits import CachedTeacherLogits, TeacherLogits
from sortkd.utils.files import exclusive


@pytest.fixture(scope="module")
def batches():
    return Batches(load_digits().subset(train_size=120))


def views(epoch=1, seed=0, count=120):
    return draw_views(count, 2, False, seed, epoch)


def rows_seen_by(network):
    "The number of rows of each batch that a network will see."
    rows = []
    network.register_forward_hook(lambda network, given, output: rows.append(len(output)))
    return rows


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_view_has_the_same_logits(batches, tmp_path, precision, flip):
    network, batches = seeded_network(), Batches(replace(batches.data, flip=flip))
    plain = TeacherLogits(network, batches, precision)
    cache = CachedTeacherLogits(network, batches, tmp_path, precision)
    plain.batch_size, cache.batch_size = 64, 50
    generator = torch.Generator().manual_seed(1)
    for count in (1, 7, 300, 300):  # in any number and order, with repetitions
        asked = torch.randint(120 * 25 * (1 + flip), (count,), generator=generator)
        images, _ = batches.gather(asked)
        with torch.no_grad(), torch.autocast("cpu", enabled=precision == "bfloat16"):
            directly = network(images).float()
        kept = cache(asked)
        assert kept.dtype == torch.float32 and kept.shape == (count, 10)
        tolerance = {"atol": 1e-5 * directly.abs().max().item(), "rtol": 2**-11}
        if precision == "bfloat16":
            tolerance = {"atol": 0.05 * directly.std().item(), "rtol": 0}
        torch.testing.assert_close(kept, directly, **tolerance)
        torch.testing.assert_close(kept, plain(asked), **tolerance)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["resnet56", pytest.param("ResNet50", marks=pytest.mark.slow)])
def test_a_views_logits_do_not_depend_on_its_company(batches, tmp_path, name, precision):
    "A run finds the same numbers in a cache that others have filled, view by view or many at once."
    network = seeded_network(name)
    together, alone = (CachedTeacherLogits(network, batches, tmp_path / each, precision)
                       for each in ("together", "alone"))
    rows = torch.arange(128)
    together(rows)
    for part in rows.split([1, 2, 3, 7, 15, 32, 68]):
        alone(part)
    kept = together.files.logits[rows]
    assert torch.equal(kept, alone.files.logits[rows]) and kept.abs().sum() > 0


def test_what_another_process_computes_reaches_a_copy_on_the_device(batches, tmp_path):
    "Every process has a copy of its own in the memory of a GPU; here in another tensor."
    one, two = (CachedTeacherLogits(seeded_network(), batches, tmp_path) for _ in range(2))
    for each in (one, two):
        each._on_device = each.files.logits.clone()
    first = one(views()[:64])
    assert torch.equal(two(views()[:64]), first) and first.abs().sum() > 0
    assert torch.equal(two(views()[32:96])[:32], first[32:]), "beside missing views"


def compute_and_die(folder, batches):
    cache = CachedTeacherLogits(seeded_network(), batches, folder)
    cache(views(1))
    cache.close()
    cache(views(2))  # and not closed
    os.kill(os.getpid(), signal.SIGKILL)


def test_another_process_goes_on_where_a_killed_one_stopped(batches, tmp_path):
    killed = context.Process(target=compute_and_die, args=(tmp_path, batches))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    network = seeded_network()
    cache, seen = CachedTeacherLogits(network, batches, tmp_path), rows_seen_by(network)
    assert cache.files.sums.count_nonzero() == len(torch.cat([views(1), views(2)]).unique())
    found = [cache(views(epoch)) for epoch in (1, 2)]
    assert not seen
    for epoch, kept in enumerate(found, 1):
        assert torch.equal(kept, TeacherLogits(network, batches)(views(epoch)).half().float())


def test_one_process_fills_and_others_wait(batches, tmp_path, capfd):
    network, said = seeded_network(), ""
    first, second = (CachedTeacherLogits(each, batches, tmp_path)
                     for each in (seeded_network(), network))
    seen = rows_seen_by(network)
    with ThreadPoolExecutor(1) as pool:
        with exclusive(first.folder / "fill.lock", "filling"):
            waiting = pool.submit(second.fill)
            while "waiting for it" not in said and not waiting.done():
                said += capfd.readouterr().out
            first(torch.arange(3000))
        waiting.result()
    assert "waiting for it" in said and not seen and second.files.sums.all()


def test_other_teachers_images_and_arithmetic_have_other_caches(batches, tmp_path):
    def folder(seed=0, precision="float32", data=batches.data, **changes):
        changed = Batches(replace(data, **changes))
        return CachedTeacherLogits(seeded_network(seed=seed), changed, tmp_path, precision).folder

    pixels = batches.data.train_images.clone()
    pixels[5, 3, 3, 1] += 1
    folders = {folder(), folder(seed=1), folder(precision="bfloat16"), folder(train_images=pixels),
               folder(mean=(0.5,) * 3), folder(pad=1), folder(flip=True)}
    assert len(folders) == 7
    assert folder(data=batches.data.subset(test_size=50)) == folder()  # test images do not matter


def compute_all(folder, batches):
    cache = CachedTeacherLogits(seeded_network(), batches, folder)
    for rows in torch.arange(3000).split(100):
        cache(rows)
    cache.close()


@pytest.mark.slow
def test_several_processes_fill_one_cache(batches, tmp_path):
    writers = [context.Process(target=compute_all, args=(tmp_path, batches)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    network, everything = seeded_network(), torch.arange(3000)
    cache = CachedTeacherLogits(network, batches, tmp_path)
    assert cache.files.sums.all()
    computed = TeacherLogits(network, batches)(everything)
    assert torch.equal(cache(everything), computed.half().float())


DAMAGE = {  # to 8,000 bytes of logits and their checksums, of ten classes: 400 rows
    "a page of zeros": ("logits.bin", 0, 4096, lambda part: bytes(len(part))),
    "NaN": ("logits.bin", 2000, 2002, lambda part: b"\x00\x7e"),
    "one bit": ("logits.bin", 7001, 7002, lambda part: bytes([part[0] ^ 1])),
    "two rows exchanged": ("logits.bin", 2000, 2040, lambda part: part[20:] + part[:20]),
    "two classes exchanged": ("logits.bin", 2000, 2004, lambda part: part[2:] + part[:2]),
    "a bit of a checksum": ("checksums.bin", 400, 401, lambda part: bytes([part[0] ^ 128])),
    "checksums of zeros": ("checksums.bin", 0, 1600, lambda part: bytes(len(part)))}


@pytest.mark.parametrize("is_open", [False, True], ids=["before it is opened", "while it is open"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_rows_are_computed_again(tmp_path, damage, is_open):
    batches = Batches(load_digits().subset(train_size=16))
    one, rows = CachedTeacherLogits(seeded_network(), batches, tmp_path), torch.arange(400)
    expected = one(rows)
    name, first, last, change = DAMAGE[damage]
    with open(one.folder / name, "r+b") as file:
        content = file.read()
        file.seek(first)
        file.write(change(content[first:last]))
    assert (one.folder / name).read_bytes() != content
    cache = one if is_open else CachedTeacherLogits(seeded_network(), batches, tmp_path)
    for _ in range(2):
        assert torch.equal(cache(rows), expected)
    assert cache.files.sound(rows).all()


@pytest.mark.parametrize("damage", ["short", "missing"])
def test_files_of_another_size_are_refused(batches, tmp_path, damage):
    logits = CachedTeacherLogits(seeded_network(), batches, tmp_path).folder / "logits.bin"
    logits.write_bytes(logits.read_bytes()[:-2]) if damage == "short" else logits.unlink()
    with pytest.raises(ValueError, match=str(logits)):
        CachedTeacherLogits(seeded_network(), batches, tmp_path)


def test_logits_beyond_half_precision_are_refused(batches, tmp_path):
    network = seeded_network()
    with torch.no_grad():
        network.classifier_layer.weight.mul_(1e8)
    with pytest.raises(ValueError, match="half precision.*cache='off'"):
        CachedTeacherLogits(network, batches, tmp_path)(views())


def test_a_full_disk_is_an_error_before_anything_is_computed(batches, tmp_path):
    with full_disk(10_000), pytest.raises(OSError, match="0.00 GB.*cache=.off"):
        CachedTeacherLogits(seeded_network(), batches, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.cuda
def test_on_a_gpu(tmp_path):
    batches, network = Batches(load_digits().subset(train_size=120), "cuda"), seeded_network()
    cache, plain = CachedTeacherLogits(network, batches, tmp_path), TeacherLogits(network, batches)
    for _ in range(2):
        assert cache(views()).is_cuda
        torch.testing.assert_close(cache(views()), plain(views()), rtol=2e-3, atol=1e-3)
    again = CachedTeacherLogits(network, batches, tmp_path)
    assert torch.equal(again(views()), cache(views()))
