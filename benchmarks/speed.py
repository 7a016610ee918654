"""How much faster: the step, the epoch, the run and `sort_logits`, each beside the usual way, in one run on one machine.

    python benchmarks/speed.py

prints a table of medians and ratios, draws how the costs grow (paper_figures/growth.png), and appends a record to
results/benchmarks.jsonl. `--quick` measures small things for seconds, to see that all of it works; it keeps no record.

The ways alternate, so that a change of the machine's speed meets all of them. Images are CIFAR-100 where it is on disk,
else noise of the same shape; neither the images nor the weights of the networks, which are random, change a time.
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import usual_way
from torch.utils.flop_counter import FlopCounterMode

from sortkd.data import Batches, ImageData, has_cifar100, load_cifar100
from sortkd.pairs import PAIRS
from sortkd.records import append_record, describe_machine
from sortkd.methods import create_method
from sortkd.models import create_model
from sortkd.sorting import sort_logits
from sortkd.teacher_logits import CachedTeacherLogits, TeacherLogits, expected_views
from sortkd.devices import Ranks, create_fabric, precision_of
from sortkd.lessons import Lessons
from sortkd.training import Learner, Recipe, Student, evaluate, teach, train

SORT_SHAPES = [(64, 10), (64, 100), (512, 100), (512, 1000), (64, 4000), (64, 32000)]


def cifar_like(train_size: int, test_size: int) -> ImageData:
    "Part of CIFAR-100, or noise where it is not on disk."
    if has_cifar100():
        return load_cifar100().subset(train_size=train_size, test_size=test_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (train_size + test_size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    targets = torch.arange(train_size + test_size) % 100
    return ImageData(
        "noise", images[:train_size], targets[:train_size], images[train_size:], targets[train_size:],
        tuple(map(str, range(100))), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), pad=4, flip=True,
    )  # fmt: skip


def seconds(work, device: str) -> float:
    "Wall-clock time of `work()`, the device's queue included."
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(ways: dict, repetitions: int, device: str) -> dict[str, list[float]]:
    "Seconds of each of `ways`, which map names to functions, one after another, `repetitions` times, after one round unmeasured."
    times = {name: [] for name in ways}
    for number in range(repetitions + 1):
        for name, work in ways.items():
            elapsed = seconds(work, device)
            if number:
                times[name].append(elapsed)
    return times


def medians(times: dict[str, list[float]], per: float = 1) -> dict[str, float]:
    return {name: 1e3 * statistics.median(values) / per for name, values in times.items()}


def row(what: str, setting: str, plain_ms: float, ours_ms: float, **more) -> dict:
    return {"what": what, "setting": setting, "plain_ms": plain_ms, "ours_ms": ours_ms, "ratio": plain_ms / ours_ms, **more}


@torch.no_grad()
def random_teacher(name: str) -> torch.nn.Module:
    "A network with random weights, its classifier scaled so that logits are of a usual size."
    network = create_model(name, 100).eval()
    spread = network(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))).std()
    network.classifier_layer.weight.mul_(3 / spread)
    return network


class Pair:
    "Teacher and student of a pair, set up the usual way and ours on the same images."

    def __init__(self, name: str, data: ImageData, batch_size: int, device: str, cache_dir: str):
        pair = PAIRS[name]
        self.data, self.device = data, device
        self.recipe = Recipe(lr=pair.lr, batch_size=batch_size)
        new = lambda architecture: create_model(architecture, 100).to(device)  # noqa: E731
        self.usual_student, self.usual_teacher = new(pair.student), random_teacher(pair.teacher).to(device)
        self.usual_optimizer = usual_way.optimizer_of(self.usual_student, self.recipe)
        self.usual_loaders = usual_way.loaders(data, batch_size)

        self.fabric = create_fabric(device)
        self.batches = Batches(data, device)
        self.computed = TeacherLogits(random_teacher(pair.teacher), self.batches, precision_of(self.fabric))
        self.cached = CachedTeacherLogits(random_teacher(pair.teacher), self.batches, cache_dir, precision_of(self.fabric))
        student = Student(new(pair.student), create_method("kd+sort"), replace(self.recipe, batch_size=batch_size))
        self.learner = Learner(student, self.fabric, "")
        self.student = self.learner.model
        self.stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()  # as `train` has it

    def usual_steps(self, count: int):
        usual_way.train_batches(
            self.usual_student, self.usual_teacher, self.usual_optimizer, self.usual_iterator, self.device, count
        )

    def our_steps(self, count: int, teacher) -> None:
        with self.stream:
            self.learner.start_epoch(1, 0)
            teach([self.learner], self.lessons(count, teacher), 1, lambda: None)
            self.learner.totals.tolist()  # waits for the device

    @cache
    def lessons(self, count: int, teacher) -> Lessons:
        "An epoch of `count` steps, on the first images: so that no teacher's logits are looked up for steps that are not made."
        images = count * self.recipe.batch_size
        data = replace(self.data, train_images=self.data.train_images[:images], train_targets=self.data.train_targets[:images])
        return Lessons(Batches(data, self.device), teacher, self.recipe.batch_size, 0, Ranks(self.fabric))

    def measure_steps(self, count: int, repetitions: int) -> dict[str, float]:
        "Milliseconds a step."
        self.usual_iterator = chain.from_iterable(repeat(self.usual_loaders[0]))
        list(islice(self.usual_iterator, 2))  # the workers have started
        ways = {
            "usual": lambda: self.usual_steps(count),
            "computed": lambda: self.our_steps(count, self.computed),
            "cached": lambda: self.our_steps(count, self.cached),
        }
        result = medians(alternate(ways, repetitions, self.device), count)
        del self.usual_iterator
        return result

    def usual_epoch(self):
        train_loader, test_loader = self.usual_loaders
        usual_way.train_batches(self.usual_student, self.usual_teacher, self.usual_optimizer, train_loader, self.device)
        usual_way.test_top1(self.usual_student, test_loader, self.device)

    def our_epoch(self, teacher):
        self.our_steps(len(self.data.train_targets) // self.recipe.batch_size, teacher)
        evaluate(self.student, self.batches, self.fabric)


def measure_step_and_epoch(pair: str, settings, device: str, folder: str) -> list[dict]:
    name = f"{PAIRS[pair].teacher} to {PAIRS[pair].student}"
    at_work = Pair(pair, cifar_like(settings.images, settings.images // 2), 64, device, f"{folder}/{pair}")
    steps = at_work.measure_steps(settings.steps, settings.repetitions)
    ways = {
        "usual": at_work.usual_epoch,
        "computed": lambda: at_work.our_epoch(at_work.computed),
        "cached": lambda: at_work.our_epoch(at_work.cached),
    }
    epochs = medians(alternate(ways, 1 if device == "cpu" else 3, device))
    floor = floor_of_step(pair, at_work, device)
    return [
        row(f"{what}, teacher logits {kind}", f"{name}, batch 64{more}", times["usual"], times[kind], **extra)
        for what, times, more in (
            ("step", steps, ""),
            ("epoch", epochs, f", {settings.images:,} training and {settings.images // 2:,} test images"),
        )
        for kind in ("computed", "cached")
        for extra in [{"floor_ms": floor[kind]} if what == "step" else {}]
    ]


def floor_of_step(pair: str, at_work: Pair, device: str) -> dict[str, float]:
    "Milliseconds that the operations of a step take at the rate of a large matrix product in the same precision."
    images = torch.zeros(64, 3, 32, 32, device=device)
    student, teacher = create_model(PAIRS[pair].student, 100).to(device), create_model(PAIRS[pair].teacher, 100).to(device)
    with FlopCounterMode(display=False) as counted:
        student(images).sum().backward()
    student_operations = counted.get_total_flops()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        teacher(images)
    dtype = torch.bfloat16 if precision_of(at_work.fabric) == "bfloat16" else torch.float32
    size = 2048 if device == "cpu" else 8192
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    rate = 2 * size**3 / statistics.median(alternate({"product": lambda: matrix @ matrix}, 5, device)["product"])
    return {
        "cached": 1e3 * student_operations / rate,
        "computed": 1e3 * (student_operations + counted.get_total_flops()) / rate,
    }


def measure_run(pair: str, settings, device: str) -> list[dict]:
    "A whole short run, with the cache made, filled as views are met, evaluation and checkpoints; then one that finds it filled."
    data, recipe = cifar_like(settings.images // 2, settings.images // 4), Recipe(lr=PAIRS[pair].lr).shortened(settings.epochs)
    new = lambda name: create_model(name, 100)  # noqa: E731
    student, teacher = PAIRS[pair].student, PAIRS[pair].teacher
    fabric = create_fabric(device)
    with tempfile.TemporaryDirectory() as folder:
        the_teacher = random_teacher(teacher)

        def ours():
            batches = Batches(data, device)
            logits = CachedTeacherLogits(the_teacher, batches, folder, precision_of(fabric))
            train(new(student), batches, create_method("kd+sort"), recipe, fabric, teacher=logits, checkpoint=f"{folder}/checkpoint.pt")
            Path(f"{folder}/checkpoint.pt").unlink()

        usual = 1e3 * seconds(lambda: usual_way.train(new(student), random_teacher(teacher), data, recipe, device), device)
        first, second = (1e3 * seconds(ours, device) for _ in range(2))
    setting = f"{teacher} to {student}, {recipe.epochs} epochs of {settings.images // 2:,} images"
    return [
        row("run, teacher logits kept as they are met", setting, usual, first),
        row("run, teacher logits there", setting, usual, second),
    ]


def logits_with_mistakes(rows: int, classes: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    "Logits of a teacher that is wrong in a fifth of the rows, where one to five classes rank above the target."
    generator = torch.Generator().manual_seed(rows * classes)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    rank = torch.where(torch.arange(rows) % 5 == 0, torch.randint(1, min(6, classes), (rows,), generator=generator), 0)
    ranked = logits.sort(1, descending=True).values
    value = torch.where(rank == 0, ranked[:, 0] + 0.1, ranked.gather(1, rank[:, None])[:, 0] + 1e-3)
    logits[torch.arange(rows), target] = value
    return logits.to(device), target.to(device)


def measure_sorting(shapes, settings, device: str) -> list[dict]:
    rows = []
    for shape in shapes:
        logits, target = logits_with_mistakes(*shape, device)
        ways = {
            "usual": lambda: usual_way.two_full_sorts(logits, target),
            "ours": lambda: sort_logits(logits, target),
            "copy": logits.clone,
        }
        assert torch.equal(ways["usual"](), ways["ours"]())
        times = {name: [] for name in ways}
        for _ in range(settings.sort_repetitions):  # each way some times in a row, as a fresh start costs more than the work
            for name, work in ways.items():
                times[name] += [seconds(work, device) for _ in range(10)][3:]
        times = medians(times)
        rows.append(row("sort_logits", str(shape), times["usual"], times["ours"], floor_ms=times["copy"]))
    return rows


def measure_growth(pair: str, settings, device: str, folder: str) -> list[dict]:
    "The step at other batch sizes."
    rows = []
    for batch_size in settings.batch_sizes:
        at_work = Pair(pair, cifar_like(max(settings.images, 8 * batch_size), 100), batch_size, device, f"{folder}/batch{batch_size}")
        steps = at_work.measure_steps(max(2, settings.steps // 2), max(1, settings.repetitions - 1))
        name = f"{PAIRS[pair].teacher} to {PAIRS[pair].student}, batch {batch_size}"
        rows += [row(f"step, teacher logits {kind}", name, steps["usual"], steps[kind]) for kind in ("computed", "cached")]
    return rows


def _steps_in_process(pair, settings, device, folder, threads, barrier, results):
    "Milliseconds a step of one run, measured while the other processes at the barrier do the same."
    torch.set_num_threads(threads)
    at_work = Pair(pair, cifar_like(settings.images, 100), 64, device, folder)
    for _ in range(2):
        at_work.our_steps(settings.steps, at_work.cached)
    barrier.wait()
    work = {"cached": lambda: at_work.our_steps(settings.steps, at_work.cached)}
    results.put(medians(alternate(work, 2 * settings.repetitions, device), settings.steps)["cached"])


def measure_at_once(pair: str, settings, device: str, folder: str) -> list[dict]:
    "A step of each of several runs: one after the other with all threads, and at once in processes that share them."
    context, threads = torch.multiprocessing.get_context("spawn"), torch.get_num_threads()

    def measure(runs: int) -> float:
        barrier, results = context.Barrier(runs), context.SimpleQueue()
        arguments = (pair, settings, device, f"{folder}/at_once", max(1, threads // runs), barrier, results)
        processes = [context.Process(target=_steps_in_process, args=arguments) for _ in range(runs)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a process of {runs} runs at once failed; its error is above.")
        return statistics.mean(results.get() for _ in processes)

    alone = measure(1)
    name = f"{PAIRS[pair].teacher} to {PAIRS[pair].student}, batch 64"
    return [
        {"what": f"a step of each of {runs} runs", "setting": name, "one_after_another_ms": runs * alone, "at_once_ms": at_once, "ratio": runs * alone / at_once}
        for runs in settings.runs_at_once
        for at_once in [measure(runs)]
    ]  # fmt: skip


def draw_growth(rows: list[dict], growth: list[dict], pair: str, path: str) -> None:
    "Left: a step's cost with the batch, middle: `sort_logits`, right: a run's steps with its epochs, from the step measured."
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    styles = {"usual way": "k-o", "ours, computed": "k--s", "ours, kept": "k:^"}
    both = [each for each in growth if each["what"].endswith("computed")], [each for each in growth if each["what"].endswith("cached")]
    sizes = [int(each["setting"].rsplit(" ", 1)[1]) for each in both[0]]
    curves = ([each["plain_ms"] for each in both[0]], [each["ours_ms"] for each in both[0]], [each["ours_ms"] for each in both[1]])
    for (label, style), curve in zip(styles.items(), curves):
        left.plot(sizes, curve, style, label=label, markersize=4)
    left.set(xlabel="batch", ylabel="ms a step", xscale="log", yscale="log")
    left.set_xticks(sizes, sizes)
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)

    sorting = sorted((each for each in rows if each["what"] == "sort_logits"), key=lambda each: size_of(each["setting"]))
    elements = [size_of(each["setting"]) for each in sorting]
    for label, style, key in (("two full sorts", "k-o", "plain_ms"), ("sort_logits", "k:^", "ours_ms"), ("a copy", "k--", "floor_ms")):
        middle.plot(elements, [each[key] for each in sorting], style, label=label, markersize=4)
    middle.set(xlabel="logits in the batch", ylabel="ms", xscale="log", yscale="log")
    middle.legend(frameon=False, fontsize=8)

    steps = {each["what"].rsplit(" ", 1)[1]: each for each in rows if each["what"].startswith("step")}
    epochs = [1, 2, 5, 10, 20, 40, 80, 160, 240]
    usual, kept = steps["cached"]["plain_ms"], steps["cached"]["ours_ms"]
    teacher = steps["computed"]["ours_ms"] - kept
    per_epoch = 782 / 3.6e6
    right.plot(epochs, [per_epoch * usual * each for each in epochs], "k-", label="usual way")
    right.plot(epochs, [per_epoch * (kept + teacher) * each for each in epochs], "k--", label="ours, computed")
    right.plot(epochs, [per_epoch * (kept * each + teacher * expected_views(162, each)) for each in epochs], "k:", label="ours, kept as met")
    right.plot(epochs, [per_epoch * kept * each for each in epochs], "k-.", label="ours, all there")
    right.set(xlabel="epochs of 50,000 images", ylabel="hours of steps", xscale="log", yscale="log")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    right.set_xticks([1, 10, 100, 240], [1, 10, 100, 240])
    right.minorticks_off()
    figure.savefig(path, dpi=150, metadata={"Software": None})


def size_of(text: str) -> int:
    "Elements of a shape written as `(512, 1000)`."
    rows, classes = text.strip("()").split(",")
    return int(rows) * int(classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="r32x4_r8x4", choices=list(PAIRS))
    parser.add_argument("--only", choices=["step", "run", "sort", "growth", "at_once"], help="measure one part")
    parser.add_argument("--quick", action="store_true", help="small things, for seconds; no record")
    parser.add_argument("--results", default="results/benchmarks.jsonl")
    parser.add_argument("--figure", default="paper_figures/growth.png")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    arguments = parser.parse_args()
    settings = argparse.Namespace(images=1024, steps=6, repetitions=5, sort_repetitions=31, epochs=3, batch_sizes=[16, 32, 64, 128], runs_at_once=[2])
    shapes = SORT_SHAPES
    if arguments.quick:
        settings = argparse.Namespace(images=256, steps=2, repetitions=1, sort_repetitions=3, epochs=2, batch_sizes=[16, 32], runs_at_once=[2])
        shapes = SORT_SHAPES[:4]
    device = create_fabric(arguments.device).device.type
    if device == "cuda":
        settings.runs_at_once = [2, 4, 8]
    rows, growth, at_once = [], [], []

    def wanted(part):
        return arguments.only in (None, part)

    with tempfile.TemporaryDirectory() as folder:
        if wanted("sort"):
            rows += measure_sorting(shapes, settings, device)
        if wanted("step"):
            rows += measure_step_and_epoch(arguments.pair, settings, device, folder)
        if wanted("run"):
            rows += measure_run(arguments.pair, settings, device)
        if wanted("growth"):
            growth += measure_growth(arguments.pair, settings, device, folder)
        if wanted("at_once"):
            at_once += measure_at_once(arguments.pair, settings, device, folder)

    width = max(len(f"{each['what']}, {each['setting']}") for each in rows + growth + at_once)
    print(f"{'':{width}}  usual (ms)   ours (ms)   ratio   floor (ms)")
    for each in rows + growth:
        floor = f"{each['floor_ms']:12.3f}" if "floor_ms" in each else ""
        print(f"{each['what'] + ', ' + each['setting']:{width}}  {each['plain_ms']:10.3f}  {each['ours_ms']:10.3f}  {each['ratio']:6.1f} {floor}")
    for each in at_once:
        print(
            f"{each['what'] + ', ' + each['setting']}: one after another {each['one_after_another_ms']:.1f} ms, "
            f"at once {each['at_once_ms']:.1f} ms, ratio {each['ratio']:.2f}"
        )
    if not arguments.only:
        draw_growth(rows, growth, arguments.pair, arguments.figure)
    if not arguments.quick:
        record = {
            "benchmark": "speed",
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device,
            **describe_machine(device),
            "rows": rows + growth,
            "at_once": at_once,
        }
        append_record(arguments.results, record)
        print(f"recorded in {arguments.results}")


if __name__ == "__main__":
    main()
