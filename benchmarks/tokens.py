"""What sorting costs a language model, in time and memory, beside the same loss without it, on this machine.

    python benchmarks/tokens.py --device cpu

prints milliseconds, the peak of extra memory and the ratios of KL with sorting to plain KL, and appends a record with every
repetition to results/measurements/benchmarks.jsonl. `--quick` measures small logits for seconds and keeps no record.

The ways take turns, as in speed.py; forward and backward passes. Logits are bfloat16. Half of the tokens are wrong; the
target's rank in them lies between 2 and 1,000, evenly on a logarithmic scale. Memory is what is allocated at once beyond
inputs and the gradients that the pass returns: counted by PyTorch's profiler on a CPU, by the allocator on a GPU.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from datetime import UTC, datetime

import torch
from speed import time_in_turns
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sortkd import DistillationLoss, sort_topk
from sortkd.experiment.provenance import describe_machine
from sortkd.experiment.storage import append_record
from sortkd.sorting import sort_logits
from sortkd.tokens import LinearDistillationLoss
from sortkd.train.devices import create_fabric

FROM_LOGITS = [(1024, 151936, 6), (1024, 32000, 24)]  # tokens, classes, and tokens in a chunk
FROM_HIDDEN_STATES = [(64, 151936, 4), (128, 151936, 32), (512, 32000, 32)]
WIDTH = 512  # of hidden states
LISTS = [50, 64, 128]
PLAIN, SORTED = "kd(temperature=1)", "kd(temperature=1)+sort"


def choose_targets(logits: Tensor) -> Tensor:
    "Targets `(T,)` of a teacher's logits `(T, V)`, half of which it gets wrong."
    generator = torch.Generator().manual_seed(len(logits))
    draw = torch.rand(len(logits), generator=generator)
    rank = (min(1000, logits.shape[1]) ** draw).long().clamp(max=logits.shape[1] - 1)
    rank[::2] = 0
    chunks = zip(logits.float().split(64), rank.to(logits.device).split(64))
    return torch.cat([one.argsort(-1, descending=True).gather(-1, two[:, None])[:, 0] for one, two in chunks])


def peak_memory(work: Callable, device: str) -> int:
    "Bytes that `work` has allocated at most at one time, without what it returns."
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = highest = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def of_logits(tokens: int, classes: int, chunk: int, device: str) -> tuple[dict[str, Callable], int]:
    "Plain and sorted KL of logits `(T, V)` in chunks, and the bytes of the gradient."
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    student, teacher = (torch.randn(tokens, classes, **draw).mul_(3) for _ in range(2))
    target = choose_targets(teacher)

    def way(method: str) -> Callable:
        loss = DistillationLoss(method, chunk_tokens=chunk)
        return lambda: torch.autograd.grad(loss(student.requires_grad_(), teacher, target), student)

    return {"KL": way(PLAIN), "KL with sorting": way(SORTED)}, student.nbytes


def of_hidden_states(tokens: int, classes: int, chunk: int, device: str) -> tuple[dict[str, Callable], int]:
    "The same from hidden states and output heads."
    torch.manual_seed(0)
    student, teacher = torch.randn(2, tokens, WIDTH, device=device)
    heads = [nn.Linear(WIDTH, classes, bias=False, device=device) for _ in range(2)]
    with torch.no_grad():
        heads[1].weight.mul_(3)
        target = torch.cat([choose_targets(heads[1](part)) for part in teacher.split(64)])
    leaves = [student.requires_grad_(), heads[0].weight]

    def way(method: str) -> Callable:
        loss = LinearDistillationLoss(method, chunk_tokens=chunk)
        return lambda: torch.autograd.grad(loss(student, heads[0], teacher, heads[1], target), leaves)

    return {"KL": way(PLAIN), "KL with sorting": way(SORTED)}, sum(each.nbytes for each in leaves)


def measure(from_logits, from_hidden_states, repetitions: int, device: str) -> list[dict]:
    settings = [("from logits", of_logits, each) for each in from_logits]
    settings += [("from hidden states", of_hidden_states, each) for each in from_hidden_states]
    rows = []
    for what, make, (tokens, classes, chunk) in settings:
        ways, gradients = make(tokens, classes, chunk, device)
        memory = {name: peak_memory(way, device) - gradients for name, way in ways.items()}
        rows.append({
            "what": what, "tokens": tokens, "classes": classes, "chunk": chunk,
            "ms": time_in_turns(ways, repetitions, device),
            "extra_bytes": memory, "logits_bytes": 2 * tokens * classes,
        })
    return rows


def measure_lists(tokens: int, lengths, repetitions: int, device: str) -> list[dict]:
    "`sort_topk` of descending lists, and of the same lists in another order."
    rows = []
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        values, classes = torch.randn(tokens, 4 * length, generator=generator).topk(length)
        values = values.log_softmax(-1)
        place = torch.randint(length, (tokens, 1), generator=generator)
        target, order = classes.gather(1, place)[:, 0], torch.randperm(length, generator=generator)
        lists = [each.to(device) for each in (values, classes, values[:, order], classes[:, order], target)]
        ways = {"descending": lambda lists=lists: sort_topk(lists[0], lists[1], lists[4]),
                "in any order": lambda lists=lists: sort_topk(lists[2], lists[3], lists[4])}
        assert torch.equal(ways["descending"]()[0][:, order], ways["in any order"]()[0])
        times = time_in_turns(ways, repetitions, device, at_least=0.05)
        rows.append({"what": "sort_topk", "tokens": tokens, "k": length, "ms": times})
    return rows


def measure_sorting(tokens: int, classes: int, repetitions: int, device: str) -> list[dict]:
    "`sort_logits` alone, beside a copy of the logits."
    logits = 3 * torch.randn(tokens, classes, device=device)
    target = choose_targets(logits)
    ways = {"sort_logits": lambda: sort_logits(logits, target), "a copy": logits.clone}
    memory = {name: peak_memory(way, device) for name, way in ways.items()}
    times = time_in_turns(ways, repetitions, device, at_least=0.05)
    return [{"what": "sort_logits", "tokens": tokens, "classes": classes, "ms": times, "extra_bytes": memory,
             "logits_bytes": 4 * tokens * classes}]


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        print(", ".join(f"{key} {row[key]}" for key in ("what", "tokens", "classes", "chunk", "k") if key in row))
        first = statistics.median(next(iter(row["ms"].values())))
        for name, times in row["ms"].items():
            memory = row.get("extra_bytes", {}).get(name)
            beside = f", {memory / 2**20:,.1f} MiB ({memory / row['logits_bytes']:.3f} of the logits)" if memory else ""
            print(f"  {name}: {statistics.median(times):,.2f} ms ({min(times):,.2f} to {max(times):,.2f}), "
                  f"{statistics.median(times) / first:.3f} of the first{beside}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small logits, for seconds; no record")
    parser.add_argument("--results", default="results/measurements/benchmarks.jsonl")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    given = parser.parse_args()
    device, load = create_fabric(given.device).device.type, os.getloadavg()[0]
    repetitions, sizes = given.repetitions, (FROM_LOGITS, FROM_HIDDEN_STATES)
    if given.quick:
        repetitions, sizes = 1, ([(16, 500, 4)], [(16, 500, 4)])
    elif device == "cuda":
        sizes = tuple([(4096, classes, 32 * chunk) for _, classes, chunk in each] for each in sizes)
    rows = measure(*sizes, repetitions, device)
    rows += measure_lists(64 if given.quick else 8192, LISTS, repetitions, device)
    rows += measure_sorting(16 if given.quick else 256, sizes[0][0][1], repetitions, device)
    print_rows(rows)
    if not given.quick:
        record = {
            "benchmark": "tokens",
            "protocol": 3,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device,
            "load_before": round(load, 2),
            **describe_machine(device),
            "rows": rows,
        }
        append_record(given.results, record)
        print(f"recorded in {given.results}")


if __name__ == "__main__":
    main()
