"What tests share: data, small networks and servers; and one thread, so that they do not wait."
import functools
import http.server
import os
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sortkd.train.cifar import has_cifar100
from sortkd.methods import list_methods
from sortkd.train.augmentation import seeded_generator
from sortkd.train.devices import Ranks
from sortkd.train.networks import create_model

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]

# Tests change the folder they run in; the data stays where it is.
if "SORTKD_DATA" in os.environ:
    os.environ["SORTKD_DATA"] = os.path.abspath(os.environ["SORTKD_DATA"])


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@contextmanager
def full_disk(size):
    "A block in which no file may grow beyond `size` bytes."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


def raises(error):
    def callback(*arguments, **options):
        raise error
    return callback


def seeded_network(name="resnet8", num_classes=10, seed=0):
    torch.manual_seed(seed)
    return create_model(name, num_classes)


@pytest.fixture(scope="session")
def weights():
    return seeded_network().state_dict()


def at_once(work, count):
    "What `count` threads find that do the same work."
    with ThreadPoolExecutor(count) as pool:
        return [each.result(60) for each in [pool.submit(work) for _ in range(count)]]


def part_of_rank(index, count):
    "Which of so many rows belong to process `index` of `count`."
    return functools.partial(Ranks.part, SimpleNamespace(index=index, count=count))


class Host(http.server.SimpleHTTPRequestHandler):
    "Serves a folder; /cut/NAME announces more than it sends."
    asked: list[str] = []

    def log_message(self, *_): ...

    def do_GET(self):
        self.asked.append(self.path)
        if not self.path.startswith("/cut/"):
            return super().do_GET()
        content = (Path(self.directory) / self.path[5:]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:-600])


@pytest.fixture
def web(tmp_path, monkeypatch):
    "A folder, the address at which a server on this machine offers its files, and what it is asked for."
    folder = tmp_path / "web"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Host, "asked", [])
    handler = functools.partial(Host, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", Host.asked
        server.shutdown()


needs_cifar100 = pytest.mark.skipif(not has_cifar100(), reason="CIFAR-100 is not under SORTKD_DATA")

# Every objective by itself and every repair with kd, in every run; all other combinations are slow tests.
QUICK_METHODS = [name for name in list_methods() if "+" not in name or name.startswith("kd+")]
EVERY_METHOD = [name if name in QUICK_METHODS else pytest.param(name, marks=pytest.mark.slow) for name in list_methods()]


def save_sample_folder(root, train=12, test=4):
    "Coloured images of many sizes under `root`, laid out like ImageNet: `train` and `test` of each of four classes."
    for split, count in (("train", train), ("val", test)):
        for name in ("dahlia", "leaves", "pagoda", "trees"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                generator = seeded_generator("sample folder", split, name, number)
                size = torch.randint(85, 311, (2,), generator=generator).tolist()
                pixels = torch.randint(256, (6, 6, 3), dtype=torch.uint8, generator=generator).numpy()
                Image.fromarray(pixels).resize(size).save(root / split / name / f"{split}_{number:05}.JPEG", quality=90)
    return root
