"""Is the fast way's student as good? The usual way against ours, over seeds, on real CIFAR-100.

    SORTKD_DATA=... python benchmarks/accuracy.py --train-size 2500 --epochs 6 --seeds 5

trains resnet20 with sorted logits of a ResNet-56 from `teachers/`, once the usual way (`usual_way.py`: float32, the teacher
in every step, its own order and views) and once ours (native precision, kept logits), prints the difference of the mean
last-epoch top-1 with Welch's 95 % interval, and appends a record to results/measurements/benchmarks.jsonl.
"""

import argparse
import statistics
import tempfile
from datetime import UTC, datetime

import torch
import usual_way
from scipy.stats import ttest_ind

from sortkd.train.augmentation import Batches
from sortkd.train.images import load_cifar100
from sortkd.experiment.storage import append_record
from sortkd.experiment.provenance import describe_machine
from sortkd.methods import create_method
from sortkd.train.networks import create_model
from sortkd.train.teacher_logits import CachedTeacherLogits
from sortkd.train.teachers import load_teacher
from sortkd.train.devices import create_fabric, precision_of
from sortkd.train.trainer import Recipe, train


def initial_student(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_model("resnet20", 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="teachers/resnet56-cifar100-10epochs.safetensors")
    parser.add_argument("--train-size", type=int, default=2500)
    parser.add_argument("--test-size", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--results", default="results/measurements/benchmarks.jsonl")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds is {arguments.seeds}; an interval needs at least 2.")

    teacher = load_teacher(arguments.teacher, "resnet56", 100).model
    data = load_cifar100().subset(train_size=arguments.train_size, test_size=arguments.test_size)
    recipe = Recipe().shortened(arguments.epochs)
    fabric = create_fabric(arguments.device)
    batches, top1 = Batches(data, fabric.device), {"usual": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            top1["usual"].append(usual_way.train(initial_student(seed), teacher, data, recipe, fabric.device)[-1])
            logits = CachedTeacherLogits(teacher, batches, folder, precision_of(fabric))
            outcome = train(initial_student(seed), batches, create_method("kd+sort"), recipe, fabric, teacher=logits, seed=seed)
            top1["ours"].append(outcome.last["test_top1"])
            print(f"seed {seed}: usual {top1['usual'][-1]:.2f}, ours {top1['ours'][-1]:.2f}", flush=True)

    test = ttest_ind(top1["ours"], top1["usual"], equal_var=False)
    low, high = test.confidence_interval(0.95)
    difference = statistics.mean(top1["ours"]) - statistics.mean(top1["usual"])
    for name, values in top1.items():
        print(f"{name:5}  {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} over {len(values)} seeds")
    print(f"ours minus usual: {difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}")
    record = {
        "benchmark": "accuracy",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": fabric.device.type,
        "precision": precision_of(fabric),
        "arguments": {key: value for key, value in vars(arguments).items() if key not in ("results", "device")},
        **describe_machine(fabric.device.type),
        "top1": top1,
        "difference": difference,
        "interval": [float(low), float(high)],
        "rows": [],
    }
    append_record(arguments.results, record)
    print(f"recorded in {arguments.results}")


if __name__ == "__main__":
    main()
