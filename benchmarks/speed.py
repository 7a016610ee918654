"""How fast: `sort_logits` beside two full sorts, an epoch of training beside the usual way, and students of one seed that
are trained together beside the same students one after the other, on this machine.

    python benchmarks/speed.py --pair resnet20:resnet8 --students 2

prints milliseconds, median and range, and appends a record with every repetition to results/measurements/benchmarks.jsonl. `--quick`
measures small things for seconds, to see that all of it works; it keeps no record.

The ways take turns, so that a change of the machine's speed meets all of them, and the first round is not counted. Images
are CIFAR-100 where it is on disk, else noise of the same shape; neither the images nor the weights of the networks, which
are random, change a time.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch
import usual_way

from sortkd.train.augmentation import Batches
from sortkd.train.images import ImageData, load_cifar100
from sortkd.train.cifar import has_cifar100
from sortkd.train.devices import create_fabric, native_precision
from sortkd.train.batches import Batch
from sortkd.methods import create_method
from sortkd.train.networks import create_model
from sortkd.experiment.pairs import pair_for
from sortkd.experiment.storage import append_record
from sortkd.experiment.provenance import describe_machine
from sortkd.sorting import sort_logits
from sortkd.train.teacher_logits import CachedTeacherLogits
from sortkd.train.trainer import Learner, Recipe, Student, evaluate, train, train_together

SORT_SHAPES = [(64, 10), (64, 100), (512, 100), (512, 1000), (64, 4000), (64, 32000)]
METHODS = ["kd", "kd+sort", "kd+swap", "kd+revise"]  # of the students of one seed


def time_in_turns(ways: dict[str, Callable], repetitions: int, device: str, at_least: float = 0.0) -> dict[str, list[float]]:
    """Milliseconds of each of `ways`, `repetitions` times in turns, the device's queue included. A way that takes less than
    `at_least` seconds is repeated until it has taken that long, and its mean is one repetition.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repetitions + 1):
        for name, work in ways.items():
            calls, elapsed = 0, 0.0
            wait()
            start = time.perf_counter()
            while not calls or elapsed < at_least:
                work()
                wait()
                calls, elapsed = calls + 1, time.perf_counter() - start
            if turn:
                times[name].append(1e3 * elapsed / calls)
    return times


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


def measure_sorting(shapes, repetitions: int, device: str, random_targets: bool = False) -> list[dict]:
    "With `random_targets` nearly every row is wrong, and the target lies anywhere in the ranking."
    rows = []
    for shape in shapes:
        logits, target = logits_with_mistakes(*shape, device)
        if random_targets:
            target = torch.randint(shape[1], target.shape, generator=torch.Generator().manual_seed(0)).to(device)
        ways = {
            "two full sorts": lambda: usual_way.two_full_sorts(logits, target),
            "sort_logits": lambda: sort_logits(logits, target),
        }
        assert torch.equal(ways["two full sorts"](), ways["sort_logits"]())
        what = "sorting, random targets" if random_targets else "sorting"
        rows.append({"what": what, "setting": str(shape), "ms": time_in_turns(ways, repetitions, device, at_least=0.01)})
    return rows


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


@torch.no_grad()
def random_teacher(name: str) -> torch.nn.Module:
    "A network with random weights, its classifier scaled so that logits are of a usual size."
    network = create_model(name, 100).eval()
    spread = network(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))).std()
    network.classifier_layer.weight.mul_(3 / spread)
    return network


def measure_epoch(pair: str, images: int, repetitions: int, device: str) -> dict:
    "One epoch, with evaluation on an eighth as many test images: the usual way, and ours in float32 and in the native precision."
    data = cifar_like(images, images // 8)
    names = pair_for(pair)
    recipe = Recipe(lr=names.lr).shortened(1)
    teacher = random_teacher(names.teacher).to(device)

    def usual():
        usual_way.train(create_model(names.student, 100), teacher, data, recipe, device)

    def ours(fabric, batches, logits):
        train(create_model(names.student, 100), batches, create_method("kd+sort"), recipe, fabric, teacher=logits)

    ways: dict[str, Callable] = {"usual, float32": usual}
    with tempfile.TemporaryDirectory() as folder:
        for precision in dict.fromkeys(("float32", native_precision(device))):
            fabric, batches = create_fabric(device, precision), Batches(data, device)
            cached = CachedTeacherLogits(teacher, batches, folder, precision)  # filled in the first round
            for kind, logits in (("teacher in every step", teacher), ("logits cached", cached)):
                ways[f"ours, {precision}, {kind}"] = lambda fabric=fabric, batches=batches, logits=logits: ours(fabric, batches, logits)
        times = time_in_turns(ways, repetitions, device)
    return {"what": "epoch", "setting": setting_of(names, images), "ms": times}


def setting_of(names, images: int) -> str:
    return f"{names.teacher} to {names.student}, batch 64, {images:,} training and {images // 8:,} test images"


def what_students_need(pair: str, images: int, device: str) -> tuple:
    "The networks of `pair`, the native precision, the recipe of one epoch, a fabric and the batches."
    names, precision = pair_for(pair), native_precision(device)
    recipe, fabric = Recipe(lr=names.lr).shortened(1), create_fabric(device, precision)
    return names, precision, recipe, fabric, Batches(cifar_like(images, images // 8), device)


def measure_students(pair: str, images: int, count: int, repetitions: int, device: str) -> dict:
    """An epoch of `count` students of one seed, teacher's logits cached: one after the other, together, and their steps on
    one ready batch with the evaluation, which no sharing can make cheaper.
    """
    names, precision, recipe, fabric, batches = what_students_need(pair, images, device)
    methods = [create_method(name) for name in METHODS[:count]]

    def student(method):
        return Student(create_model(names.student, 100), method, recipe)

    with tempfile.TemporaryDirectory() as folder:
        logits = CachedTeacherLogits(random_teacher(names.teacher).to(device), batches, folder, precision)
        pixels, target, views = next(batches.train(recipe.batch_size, 0, 1))
        kept = logits(views)

        def one_after_the_other():
            for method in methods:
                train(create_model(names.student, 100), batches, method, recipe, fabric, teacher=logits)

        def steps_and_evaluation():
            for method in methods:
                learner = Learner(student(method), fabric)
                batch = Batch(pixels, target, method.repair_logits(kept, target))
                learner.start_epoch(1)
                for _ in range(images // recipe.batch_size):
                    learner.learn(batch)
                evaluate(learner.model, batches, fabric)

        ways = {
            "one after the other": one_after_the_other,
            "together": lambda: train_together([student(method) for method in methods], batches, fabric, teacher=logits),
            "steps and evaluation alone": steps_and_evaluation,
        }
        times = time_in_turns(ways, repetitions, device)
    return {"what": f"{count} students, {precision}", "setting": setting_of(names, images), "ms": times}


def measure_compiled(pair: str, images: int, repetitions: int, device: str) -> dict:
    "As many steps as an epoch has, on one ready batch, as they are and compiled. The compilation, in the first round, is not counted."
    names, precision, recipe, fabric, batches = what_students_need(pair, images, device)
    pixels, target, _ = next(batches.train(recipe.batch_size, 0, 1))
    method, teacher = create_method("kd+sort"), random_teacher(names.teacher).to(device)
    with torch.no_grad():
        batch = Batch(pixels, target, method.repair_logits(teacher(pixels), target))

    def steps(learner):
        learner.start_epoch(1)
        for _ in range(images // recipe.batch_size):
            learner.learn(batch)

    ways = {}
    for compiled in (False, True):
        learner = Learner(Student(create_model(names.student, 100), method, recipe, compile=compiled), fabric)
        ways["compiled" if compiled else "as they are"] = lambda learner=learner: steps(learner)
    return {"what": f"steps, {precision}", "setting": setting_of(names, images), "ms": time_in_turns(ways, repetitions, device)}


PROFILE = {  # operations of PyTorch, by what a network needs them for
    "convolutions, backward": ("aten::convolution_backward",),
    "convolutions, forward": ("aten::mkldnn_convolution", "aten::cudnn_convolution"),
    "batch normalisation": ("aten::native_batch_norm", "aten::native_batch_norm_backward", "aten::cudnn_batch_norm", "aten::cudnn_batch_norm_backward"),
    "ReLU and additions": ("aten::clamp_min", "aten::threshold_backward", "aten::add", "aten::add_"),
}


def measure_profile(pair: str, images: int, repetitions: int, device: str) -> dict:
    """Where the time of an epoch of one student goes, teacher's logits cached. The profiler makes small operations, which
    are most of the rest, look longer than they are.
    """
    names, precision, recipe, fabric, batches = what_students_need(pair, images, device)
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    times: dict[str, list[float]] = {part: [] for part in (*PROFILE, "the rest")}
    with tempfile.TemporaryDirectory() as folder:
        logits = CachedTeacherLogits(random_teacher(names.teacher).to(device), batches, folder, precision)
        for turn in range(repetitions + 1):
            with torch.profiler.profile(activities=activities) as profiler:
                train(create_model(names.student, 100), batches, create_method("kd+sort"), recipe, fabric, teacher=logits)
            spent = {each.key: each.self_device_time_total if device == "cuda" else each.self_cpu_time_total for each in profiler.key_averages()}
            sums = {part: sum(spent.pop(key, 0.0) for key in keys) for part, keys in PROFILE.items()}
            for part, us in (*sums.items(), ("the rest", sum(spent.values()))):
                if turn:  # the first fills the cache
                    times[part].append(us / 1e3)
    return {"what": f"profile, {precision}", "setting": setting_of(names, images), "ms": times}


def print_table(rows: list[dict]) -> None:
    print(f"{'milliseconds':36} {'median':>10} {'fastest':>10} {'slowest':>10}")
    for row in rows:
        print(f"{row['what']}, {row['setting']}, n = {len(next(iter(row['ms'].values())))}")
        for way, times in row["ms"].items():
            print(f"  {way:34} {statistics.median(times):10.3f} {min(times):10.3f} {max(times):10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="r56_r20", help="of the paper, or TEACHER:STUDENT")
    parser.add_argument("--images", type=int, help="of the epoch; by default 512, and 12,800 on a GPU, where a run's start would count")
    parser.add_argument("--students", type=int, default=2, choices=range(2, len(METHODS) + 1), help="of one seed")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--only", choices=["sorting", "epoch", "students", "compiled", "profile"], help="measure one part")
    parser.add_argument("--quick", action="store_true", help="small things, for seconds; no record")
    parser.add_argument("--results", default="results/measurements/benchmarks.jsonl")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    arguments = parser.parse_args()
    device = create_fabric(arguments.device).device.type
    shapes, repetitions = SORT_SHAPES, arguments.repetitions
    images = arguments.images or (12800 if device == "cuda" else 512)
    if arguments.quick:
        shapes, images, repetitions = SORT_SHAPES[:3], 128, 1
    load = os.getloadavg()[0]
    rows = []
    if arguments.only in (None, "sorting"):
        rows += measure_sorting(shapes, repetitions, device)
        rows += measure_sorting(shapes[:4], repetitions, device, random_targets=True)
    if arguments.only in (None, "epoch"):
        rows.append(measure_epoch(arguments.pair, images, repetitions, device))
    if arguments.only in (None, "students"):
        rows.append(measure_students(arguments.pair, images, arguments.students, repetitions, device))
    if arguments.only in (None, "compiled"):
        rows.append(measure_compiled(arguments.pair, images, repetitions, device))
    if arguments.only in (None, "profile"):
        rows.append(measure_profile(arguments.pair, images, min(3, repetitions), device))
    print_table(rows)
    if not arguments.quick:
        record = {
            "benchmark": "speed",
            "protocol": 2,  # every repetition is kept; records without a protocol hold medians, in `plain_ms` and `ours_ms`
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device,
            "load_before": round(load, 2),  # processes that wanted a core when this began
            **describe_machine(device),
            "rows": rows,
        }
        append_record(arguments.results, record)
        print(f"recorded in {arguments.results}")


if __name__ == "__main__":
    main()
