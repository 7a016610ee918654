"""What sorting costs a language model: `sort_logits` beside the distillation loss and two full sorts, on this machine.

    python benchmarks/tokens.py

prints milliseconds, median and range, and the ratio of `sort_logits` to the others, and appends a record with every
repetition to results/measurements/benchmarks.jsonl. `--quick` measures small logits for seconds and keeps no record.

The ways take turns, as in speed.py. Half of the tokens are wrong. "near the top" draws the target's rank in them between 2
and 100, evenly on a logarithmic scale; "one deep" is the same with one token whose target lies in the middle of the ranking;
"anywhere" draws every rank evenly between 2 and the size of the vocabulary.
"""

import argparse
import os
import statistics
from datetime import UTC, datetime

import torch
import usual_way
from speed import print_table, time_in_turns

from sortkd.train.devices import create_fabric
from sortkd.losses import kd_loss
from sortkd.experiment.storage import append_record
from sortkd.experiment.provenance import describe_machine
from sortkd.sorting import sort_logits

SHAPES = [(4, 128, 1000), (4, 128, 32000)]  # batch, length, vocabulary
DEPTHS = ["near the top", "one deep", "anywhere"]


def token_logits(shape: tuple[int, int, int], depth: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    "A teacher's logits `(B, T, V)`, and targets `(B, T)` that it gets wrong in every other token."
    generator = torch.Generator().manual_seed(sum(shape))
    logits, vocabulary = 3 * torch.randn(shape, generator=generator), shape[-1]
    draw = torch.rand(shape[:2], generator=generator)
    rank = vocabulary * draw if depth == "anywhere" else min(100, vocabulary) ** draw  # counted from 0
    rank = rank.long().clamp(1, vocabulary - 1)
    rank.view(-1)[::2] = 0
    if depth == "one deep":
        rank[0, 1] = vocabulary // 2
    target = logits.argsort(-1, descending=True).gather(-1, rank[..., None])[..., 0]
    return logits.to(device), target.to(device)


def measure(shapes, repetitions: int, device: str) -> list[dict]:
    rows = []
    for shape in shapes:
        student = torch.randn(shape, device=device, requires_grad=True)
        for depth in DEPTHS:
            logits, target = token_logits(shape, depth, device)

            def loss(teacher=logits):
                torch.autograd.grad(kd_loss(student, teacher), student)

            ways = {
                "sort_logits": lambda: sort_logits(logits, target),
                "KD loss, forward and backward": loss,
                "two full sorts": lambda: usual_way.two_full_sorts(logits.flatten(0, 1), target.flatten()),
            }
            assert torch.equal(ways["sort_logits"]().flatten(0, 1), ways["two full sorts"]())
            times = time_in_turns(ways, repetitions, device, at_least=0.01)
            rows.append({"what": f"tokens, targets {depth}", "setting": str(shape), "ms": times})
    return rows


def print_ratios(rows: list[dict]) -> None:
    print("\nsort_logits as a part of ..., by medians:")
    for row in rows:
        own, loss, sorts = (statistics.median(times) for times in row["ms"].values())
        print(f"  {row['what']}, {row['setting']}: the KD loss {own / loss:.3f}, two full sorts {own / sorts:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small logits, for seconds; no record")
    parser.add_argument("--results", default="results/measurements/benchmarks.jsonl")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    arguments = parser.parse_args()
    device, load = create_fabric(arguments.device).device.type, os.getloadavg()[0]
    rows = measure([(2, 8, 500)] if arguments.quick else SHAPES, 1 if arguments.quick else arguments.repetitions, device)
    print_table(rows)
    print_ratios(rows)
    if not arguments.quick:
        record = {
            "benchmark": "tokens",
            "protocol": 2,  # as in speed.py
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device,
            "load_before": round(load, 2),
            **describe_machine(device),
            "rows": rows,
        }
        append_record(arguments.results, record)
        print(f"recorded in {arguments.results}")


if __name__ == "__main__":
    main()
