"Checkpoints of other networks, other formats and bad intent; which teacher a run finds, and which process makes it."
import argparse
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from sortkd.train.images import load_digits
from sortkd.train.networks import create_model
from sortkd.train.teachers import find_teacher, get_teacher, load_teacher, load_weights, read_checkpoint, save_teacher, weights_checksum


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return create_model("resnet8", 10).state_dict()


def test_round_trip_names_the_same_weights(tmp_path, weights):
    path = save_teacher(tmp_path / "t.safetensors", weights, {"top1": 1.0})
    one, two = load_teacher(path, "resnet8", 10), load_teacher(path, "resnet8", 10)
    assert weights_checksum(one.model.state_dict()) == weights_checksum(two.model.state_dict()) == one.as_record()["weights_sha256"]
    assert not any(parameter.requires_grad for parameter in one.model.parameters()) and not one.model.training
    again = save_teacher(tmp_path / "again.safetensors", one.model.state_dict(), {})
    assert load_teacher(again, "resnet8", 10).as_record()["weights_sha256"] == one.as_record()["weights_sha256"]


def test_the_published_format(tmp_path, weights):
    torch.save({"epoch": 240, "model": weights, "optimizer": {}, "best_acc": 72.34}, tmp_path / "ckpt_epoch_240.pth")
    assert load_teacher(tmp_path / "ckpt_epoch_240.pth", "resnet8", 10).file == "ckpt_epoch_240.pth"


WRAPPED = ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "student.", "model._orig_mod.", "model.module.net."]


@pytest.mark.parametrize("ending", ["pth", "ckpt", "safetensors"])
@pytest.mark.parametrize("words", WRAPPED)
def test_names_behind_the_words_of_wrappers(tmp_path, weights, ending, words):
    "Beside the network's names others may stand, as a loss has them, but not under the same words."
    path, wrapped = tmp_path / f"t.{ending}", {words + name: value for name, value in weights.items()} | {"loss.weight": torch.ones(3)}
    save = save_file if ending == "safetensors" else torch.save
    save(wrapped, path)
    assert load_teacher(path, "resnet8", 10).as_record()["weights_sha256"] == weights_checksum(weights)
    save(wrapped | {f"{words}more": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="1 unknown, such as .*more"):
        load_teacher(path, "resnet8", 10)
    other = "student." if words != "student." else "teacher."
    save(wrapped | {other + name: value.clone() for name, value in weights.items()}, path)
    with pytest.raises(ValueError, match="holds this network under '.*save the one that is meant"):
        load_teacher(path, "resnet8", 10)


def test_a_network_whose_own_names_begin_like_a_wrappers(tmp_path, weights):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = create_model("resnet8", 10)
    own = {f"model.{name}": value for name, value in weights.items()}
    path = save_teacher(tmp_path / "t.safetensors", own, {})
    assert load_weights(Own(), read_checkpoint(path)[0]).state_dict().keys() == own.keys()


@pytest.mark.parametrize("place", ["model", "net", "state_dict", "model_state_dict", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("beside", [
    {}, {"epoch": 3, "best": numpy.float64(70.5)}, {"best": numpy.arange(3)}, {"args": argparse.Namespace(lr=0.1, out=Path("x"))},
    {"optimizer": {"state": {}}, "arch": "resnet8"},
], ids=["nothing", "number", "array", "arguments", "optimizer"])
def test_where_a_state_dict_is_looked_for(tmp_path, weights, place, beside, capsys):
    torch.save({place: weights} | beside, tmp_path / "t.pt")
    assert weights_checksum(read_checkpoint(tmp_path / "t.pt")[0]) == weights_checksum(weights)
    assert not capsys.readouterr().out
    if "_ema" not in place:
        torch.save({"state_dict_ema": {}, "model_ema": {"module.a": torch.ones(1)}, place: weights} | beside, tmp_path / "t.pt")
        assert weights_checksum(read_checkpoint(tmp_path / "t.pt")[0]) == weights_checksum(weights)
        assert f"the weights under {place!r} are used, not those under 'model_ema'" in capsys.readouterr().out


def test_files_that_are_refused_say_how_to_save(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "whole.pth")
    torch.save({"mine": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "mine.pth")
    torch.save(argparse.Namespace(model=1), tmp_path / "arguments.pth")
    for name, words in (("whole", "it holds torch.nn.modules.linear.Linear instead of weights"), ("mine", "found: 'mine', 'epoch'"),
                        ("arguments", "holds no state dict")):
        with pytest.raises(ValueError, match=words) as error:
            read_checkpoint(tmp_path / f"{name}.pth")
        said = str(error.value)
        assert "torch.save({'model': model.state_dict()}, PATH)" in said and "\x1b" not in said and "\n" not in said


def test_a_file_that_would_unpack_to_more_than_it_has(tmp_path):
    torch.save({"model": {"a": torch.zeros(10**6)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
    assert len(read_checkpoint(tmp_path / "plain.pth")[0]["a"]) == 10**6
    with pytest.raises(ValueError, match="bomb.pth cannot be read.*compressed, .* would take 4,00"):
        read_checkpoint(tmp_path / "bomb.pth")
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "repeated.pth")
    with pytest.raises(ValueError, match=r"repeated.pth: a is \(1000000, 1000000\), more than the file holds"):
        read_checkpoint(tmp_path / "repeated.pth")


RUNNING, COUNT = "bn1.running_var", "bn1.num_batches_tracked"


@pytest.mark.parametrize("name, value, words", [
    ("fc.bias", torch.full((10,), 1e300, dtype=torch.float64), "NaN or infinity in fc.bias, as torch.float32"),
    (RUNNING, torch.full((16,), 1e300, dtype=torch.float64), f"NaN or infinity in {RUNNING}"),
    (RUNNING, torch.full((16,), -0.1), f"a negative number in {RUNNING}"), (RUNNING, torch.full((16,), torch.nan), "NaN"),
    (COUNT, torch.tensor(-1), f"a negative number in {COUNT}"), (COUNT, torch.tensor(torch.inf), f"NaN or infinity in {COUNT}"),
    (COUNT, torch.tensor(1.5), f"a number of another type in {COUNT}"), (COUNT, torch.tensor(1e30), f"in {COUNT}"),
])
def test_numbers_are_checked_as_the_network_holds_them(tmp_path, weights, name, value, words):
    network = create_model("resnet8", 10)
    before = weights_checksum(network.state_dict())
    with pytest.raises(ValueError, match=words):
        load_weights(network, weights | {name: value})
    assert weights_checksum(network.state_dict()) == before
    if value.is_floating_point() == weights[name].is_floating_point():
        with pytest.raises(ValueError, match="t.safetensors is not written: it holds"):
            save_teacher(tmp_path / "t.safetensors", weights | {name: value}, {})
    assert not list(tmp_path.iterdir())
    assert load_weights(network, weights | {COUNT: torch.tensor(3.0)}).bn1.num_batches_tracked == 3, "a whole number"


def test_statistics_are_kept_in_single_precision(tmp_path, weights):
    fine = torch.linspace(1, 2, 16) + 1e-5  # which half precision would round
    changed = weights | {RUNNING: fine, "bn1.running_mean": -1e5 * fine.double(), COUNT: torch.tensor(2**40), "index": torch.arange(5000)}
    kept = read_checkpoint(save_teacher(tmp_path / "t.safetensors", changed, {}))[0]
    assert torch.equal(kept[RUNNING], fine) and torch.equal(kept["bn1.running_mean"], (-1e5 * fine.double()).float())
    assert kept[COUNT] == 2**40 and torch.equal(kept["index"], torch.arange(5000)) and kept["fc.weight"].dtype == torch.float16


def test_refusals_name_what_is_wrong(tmp_path, weights):
    with pytest.raises(ValueError, match=r"not a checkpoint of this.*missing"):
        load_weights(create_model("resnet14", 10), weights)
    with pytest.raises(ValueError, match=r"fc.weight is \(10, 64\) and should be \(100, 64\)"):
        load_weights(create_model("resnet8", 100), weights)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere.pth")
    for name, content in (("empty.pth", b""), ("text.pth", b"hello"), ("text.safetensors", b"hello"), ("empty.safetensors", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_checkpoint(tmp_path / "list.pth")


def test_no_code_in_a_checkpoint_runs(tmp_path):
    class CreatesFile:
        def __reduce__(self): return open, (str(tmp_path / "executed"), "w")
    torch.save({"model": CreatesFile()}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(CreatesFile(), protocol=2))
    for name in ("new.pth", "old.pth"):
        with pytest.raises(ValueError, match="run code"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_which_teacher_serves(tmp_path, weights):
    digits = load_digits()
    def keep(name, **text): save_teacher(tmp_path / f"{name}.safetensors", weights, {"architecture": "resnet8", "dataset": "digits"} | text)
    find = lambda min_epochs=240, **training: find_teacher("resnet8", digits, tmp_path, min_epochs, training)
    keep("other_data", dataset="cifar100", complete=True, epochs=240, top1=99.0)
    keep("other_network", architecture="resnet14", complete=True, epochs=240, top1=99.0)
    assert find(seed=0) is None
    keep("part", complete=False, epochs=500, seed=1, top1=98.0)
    assert find(seed=0) is None and find(seed=1).file == "part.safetensors"
    keep("short", complete=True, epochs=10, seed=5, top1=60.0)
    assert find(seed=0) is None and find(min_epochs=1, seed=0).file == "short.safetensors"
    keep("full", complete=True, epochs=240, seed=5, top1=70.0)
    assert find(seed=0).file == "full.safetensors"
    assert find(min_epochs=1, seed=0).file == "full.safetensors"  # of two that serve the better one
    keep("a_better_one", complete=True, epochs=240, seed=6, top1=71.0)
    keep("worse", complete=True, epochs=240, seed=7, top1=9.5)
    assert find(seed=0).file == "a_better_one.safetensors"


def test_a_damaged_teacher_is_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="broken.safetensors is damaged"):
        find_teacher("resnet8", load_digits(), tmp_path, 1, {})


def test_trained_once_and_kept(tmp_path, weights):
    calls = []
    def train():
        calls.append(1)
        return weights, {"top1": 50.0}
    digits = load_digits()
    sources = [get_teacher("resnet8", digits, tmp_path, {"recipe": {"milestones": (1, 2)}}, train).source for _ in range(2)]
    assert sources == ["trained", "found"] and len(calls) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_texts_that_no_record_could_hold(tmp_path, weights, number):
    "They are refused before a run, not after it."
    text = '{"architecture": "resnet8", "dataset": "digits", "complete": true, "more": {"top5": [%s]}}' % number
    save_file(dict(weights), tmp_path / "odd.safetensors", {"sortkd": text})
    for look in (lambda: read_checkpoint(tmp_path / "odd.safetensors"), lambda: find_teacher("resnet8", load_digits(), tmp_path, 0, {})):
        with pytest.raises(ValueError, match="odd.safetensors"):
            look()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 7e4])
def test_no_teacher_is_kept_that_could_not_be_read(tmp_path, weights, value):
    with pytest.raises(ValueError, match="t.safetensors is not written: it holds NaN or infinity in fc.bias"):
        save_teacher(tmp_path / "t.safetensors", weights | {"fc.bias": torch.full((10,), value)}, {})
    with pytest.raises(ValueError):
        save_teacher(tmp_path / "t.safetensors", weights, {"top1": torch.nan})
    assert not list(tmp_path.iterdir())


JOBS = """
import os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
import sortkd.train.teachers
from sortkd.train.images import load_digits
from sortkd.train.networks import create_model
from sortkd.train.teachers import get_teacher

digits, published = load_digits(), "published" in sys.argv
if published:  # the first process alone asks the network, which the second could not reach
    object.__setattr__(digits, "name", "cifar100")

def fetch(folder):
    Path(f"fetched-{job}-{rank}").touch()
    time.sleep(0.5)
    if "unreachable" in sys.argv:
        raise ConnectionError("no network.")
    path = folder / sortkd.train.teachers._published_member("resnet56")
    path.parent.mkdir(parents=True)
    torch.save({"model": network().state_dict()}, path)

def network():
    torch.manual_seed(0)
    return create_model("resnet56" if published else "resnet8", 10)

def train():
    total = torch.ones(1)
    dist.all_reduce(total)  # hangs unless all processes of the job are here
    Path(f"trained-{job}-{rank}").touch()
    while len(list(Path().glob("asked-?-?"))) < 2 * jobs:  # until the other job wants the same teacher
        time.sleep(0.02)
    return network().state_dict(), {"top1": total.item()}

jobs = 1 if published else 2
for job in range(jobs):
    for rank in range(2):
        if os.fork() == 0:
            dist.init_process_group("gloo", init_method=f"file://{Path.cwd()}/meeting{job}", rank=rank, world_size=2)
            sortkd.train.teachers.fetch_published = fetch
            Path(f"asked-{job}-{rank}").touch()
            teacher = get_teacher("resnet56" if published else "resnet8", digits, "teachers", {"seed": 0}, train, fetch=published)
            Path(f"{teacher.source}-{job}-{rank}.end").touch()
            dist.barrier()
            os._exit(0)
for _ in range(2 * jobs):
    assert os.wait()[1] == 0
"""


@pytest.mark.parametrize("words, ends", [
    ((), {"trained": 2, "found": 2}),  # two jobs of two processes: one job trains, all of the other find
    (("published",), {"fetched": 2}), (("published", "unreachable"), {"trained": 2}),
])
def test_processes_of_a_job_decide_together(tmp_path, words, ends):
    done = subprocess.run([sys.executable, "-c", JOBS, *words], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert {source: len(list(tmp_path.glob(f"{source}-*.end"))) for source in ends} == ends
    for each in ends:  # whoever ended in one way was of one job
        assert len({path.name.split("-")[1] for path in tmp_path.glob(f"{each}-*.end")}) == 1
    assert len(list(tmp_path.glob("trained-?-?"))) == 2 * ("trained" in ends) and len(list(tmp_path.glob("fetched-?-?"))) == bool(words)
    assert len(list((tmp_path / "teachers").rglob("*.safetensors"))) == ("trained" in ends)
