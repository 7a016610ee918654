"""What to run first on a GPU: is the CUDA path right, what does a step cost, and which way of making it cheaper pays?

    python benchmarks/gpu_first.py            # on a GPU
    python benchmarks/gpu_first.py --cpu      # the same in miniature, to see that all of it runs

Each part stands alone: what it found is printed as a line of JSON and kept in the file that --output names before the next
part begins, and a part that fails does not stop the others. The exit status is 1 if one has failed. It needs neither images
nor a teacher: the numbers of a batch do not change its time.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from speed import cifar_like, random_teacher

from sortkd.train.checkpoints import weights_on_cpu
from sortkd.train.devices import create_fabric
from sortkd.train.batches import Batch
from sortkd.methods import create_method
from sortkd.train.networks import create_model
from sortkd.experiment.provenance import describe_machine
from sortkd.sorting import sort_logits
from sortkd.train.teacher_logits import CachedTeacherLogits
from sortkd.train.trainer import Learner, Recipe, Student, train_together


@dataclass(frozen=True)
class Size:
    "How much of each thing is measured."

    device: str
    networks: tuple[str, ...] = ("resnet8x4", "vgg8", "resnet8", "resnet20", "vgg13")
    pair: tuple[str, str] = ("resnet32x4", "resnet8x4")
    batch: int = 64
    steps: int = 200
    images: int = 10_000
    students: tuple[str, ...] = ("resnet8", "vgg8", "resnet8x4")
    at_once: tuple[int, ...] = (1, 2, 4, 8, 16, 32)

    @classmethod
    def of_rehearsal(cls):
        return cls("cpu", ("resnet8",), ("resnet8", "resnet8"), batch=8, steps=2, images=64, students=("resnet8",), at_once=(1, 2))

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Runner:
    "A student with one batch of random numbers and, on a GPU, a stream of its own."

    def __init__(self, size: Size, network: str, seed: int = 0, captures: bool = True, compiled: bool = False, deterministic: bool = False):
        torch.manual_seed(seed)
        model, method = create_model(network, 100), create_method("kd+sort")
        if compiled:
            model.compile(options={"combo_kernels": True})
        fabric = create_fabric(size.device, "bfloat16", deterministic)
        self.learner = Learner(Student(model, method, Recipe(batch_size=size.batch), seed), fabric)
        if not captures:
            self.learner.captured_step.enabled = False
        self.learner.start_epoch(100)  # after every warm-up
        images = torch.randn(size.batch, 32, 32, 3).to(size.device).permute(0, 3, 1, 2)
        target, logits = torch.randint(100, (size.batch,)).to(size.device), 3 * torch.randn(size.batch, 100).to(size.device)
        self.batch = Batch(images, target, method.repair_logits(logits, target))
        self.stream = torch.cuda.Stream() if size.device == "cuda" else None
        size.wait()

    def steps(self, count: int) -> None:
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            for _ in range(count):
                self.learner.learn(self.batch)


def ms_of_a_step(size: Size, runners: list[Runner], warm_up: int = 6, rounds: int = 5) -> dict:
    "Milliseconds of a step of one runner, median and range; `host_ms` of it the CPU was busy."
    for runner in runners:
        runner.steps(warm_up)
    times, host = [], []
    for _ in range(rounds):
        size.wait()
        start = time.perf_counter()
        for _ in range(size.steps):
            for runner in runners:
                runner.steps(1)
        host.append(time.perf_counter() - start)
        size.wait()
        times.append(time.perf_counter() - start)
    ms, host = ([round(1e3 * each / size.steps / len(runners), 4) for each in values] for values in (times, host))
    captured = all(runner.learner.captured_step.graph is not None for runner in runners)
    return {"ms": statistics.median(ms), "range": [min(ms), max(ms)], "host_ms": statistics.median(host), "captured": captured}


def sorting(size: Size) -> dict:
    "`sort_logits` gives on the device the bits that it gives on the CPU, with ties and infinities; NaN stays NaN."
    wrong, integers = [], {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for shape in ((64, 100), (2048, 100), (512, 1000), (7, 1), (64, 2)):
            logits, target = (4 * torch.randn(shape)).round().div(4).to(dtype), torch.randint(shape[1], shape[:1])
            logits[0], logits[-1, 0] = float("nan"), float("-inf")
            here, there = sort_logits(logits, target), sort_logits(logits.to(size.device), target.to(size.device)).cpu()
            same = here.view(integers[dtype.itemsize]) == there.view(integers[dtype.itemsize])
            if not (same | here.isnan() & there.isnan()).all():
                wrong.append([str(dtype), *shape])
    return {"wrong": wrong}


def same_bits(size: Size) -> dict:
    "Captured and eager steps end with the same weights, and so do the same steps again."
    def weights(captures):
        runner = Runner(size, size.networks[0], captures=captures, deterministic=True)
        runner.steps(size.steps // 5 + 4)
        size.wait()  # the steps are on the runner's stream, and copies are not
        return weights_on_cpu(runner.learner.model)

    def equal(one, other):
        return all(torch.equal(one[name], other[name]) for name in one)

    captured = weights(True)
    return {"captured equals eager": equal(captured, weights(False)), "twice": equal(captured, weights(True))}


def steps(size: Size) -> dict:
    "A step from Python against a replayed one."
    return {f"{network}, {name}": ms_of_a_step(size, [Runner(size, network, captures=captures)])
            for network in size.networks for name, captures in (("eager", False), ("captured", True))}


def students_at_once(size: Size) -> dict:
    "One student, one stream, one graph: what a step costs where several take turns to be launched."
    return {f"{network}, {count}": ms_of_a_step(size, [Runner(size, network, seed) for seed in range(count)], rounds=3)
            for network in size.students for count in size.at_once}


def epoch(size: Size) -> dict:
    "Seconds of an epoch of `images` images with everything around the steps, teacher's logits kept: one student, and two together."
    import tempfile

    data, fabric, found = cifar_like(size.images, size.images // 5), create_fabric(size.device, "bfloat16"), {}
    batches, recipe = data.batches(fabric.device), Recipe(batch_size=size.batch, epochs=3)
    with tempfile.TemporaryDirectory() as folder:
        logits = CachedTeacherLogits(random_teacher(size.pair[0]), batches, folder, "bfloat16")
        start = time.perf_counter()
        for epoch in range(1, 4):
            for block in batches.blocks(size.batch, 0, epoch):
                logits(block.views)
        found["seconds for the teacher's logits of 3 epochs"] = round(time.perf_counter() - start, 3)
        for methods in (["kd"], ["kd", "kd+sort"]):
            students = [Student(create_model(size.pair[1], 100), create_method(name), recipe) for name in methods]
            outcomes = train_together(students, batches, fabric, teacher=logits)
            found[", ".join(methods)] = {"seconds": [round(len(methods) * row["seconds"], 4) for row in outcomes[0].curve],
                                         "captured": outcomes[0].captured}
    return found


def profile(size: Size) -> dict:
    "The kernels of a step, those that take longest first, in microseconds."
    runner, kinds = Runner(size, size.networks[0]), torch.profiler.ProfilerActivity
    runner.steps(6)
    with torch.profiler.profile(activities=[kinds.CUDA if size.device == "cuda" else kinds.CPU]) as profiler:
        runner.steps(20)
        size.wait()
    rows = [(each.key[:90], each.count / 20, (each.self_device_time_total or each.self_cpu_time_total) / 20) for each in profiler.key_averages()]
    rows.sort(key=lambda row: -row[2])
    return {"kernels": sum(row[1] for row in rows), "us": round(sum(row[2] for row in rows), 1),
            "longest": [[name, count, round(us, 2)] for name, count, us in rows[:30]]}


def compiled(size: Size) -> dict:
    "The network through torch.compile, under the same capture. It rounds differently."
    start = time.perf_counter()
    runner = Runner(size, size.networks[0], compiled=True)
    runner.steps(6)
    size.wait()
    return {"seconds to compile": round(time.perf_counter() - start, 1), **ms_of_a_step(size, [runner])}


PARTS = {part.__name__: part for part in (sorting, same_bits, steps, students_at_once, epoch, profile, compiled)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a rehearsal in miniature")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", default="gpu_first.json")
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here; --cpu rehearses")
    size = Size.of_rehearsal() if arguments.cpu else Size("cuda")
    found, failed = describe_machine(size.device), []
    for name in arguments.parts:
        start = time.perf_counter()
        try:
            found[name] = PARTS[name](size)
        except Exception as error:
            traceback.print_exc()
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            failed.append(name)
        print(f"{name} ({time.perf_counter() - start:.1f} s): {json.dumps(found[name])[:3000]}", flush=True)
        Path(arguments.output).write_text(json.dumps(found, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
