"Records that are made up: numbers drawn around a planted effect, to test what reads records. Each says so in a field."
import copy
import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from sortkd.experiment.pairs import PAIRS, method_for, recipe_for
from sortkd.experiment.record import SCHEMA_VERSION
from sortkd.methods import OBJECTIVES
from sortkd.evidence.results import CIFAR100_CHECKSUM
from sortkd.train.teachers import PUBLISHED_TOP1
from sortkd.train.trainer import Recipe


def write_lines(path, records, *more):
    "A file of records, and of `more` texts as they are."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records) + "".join(more))
    return path


def changed(record, path, value):
    "A copy of `record` with another value at a dotted path; `...` removes it."
    record = copy.deepcopy(record)
    *way, last = path.split(".")
    part = record
    for name in way:
        part = part[name]
    part[last] = value
    if value is ...:
        del part[last]
    return record


def synthetic_record(pair: str = "r56_r20", method: str = "kd", seed: int = 0,
                     last_top1: float = 70.0, *, best_above_last: float = 0.3, epochs: int = 3,
                     preset: str = "synthetic", **changes) -> dict:
    "A record that was made up; with `preset='paper'` of the full recipe. `changes` replace fields."
    full = preset == "paper"
    recipe = Recipe(lr=PAIRS[pair].lr if pair in PAIRS else 0.05).shortened(240 if full else epochs)
    if full:
        recipe = recipe_for(method_for(method, PAIRS[pair]), PAIRS[pair], recipe, True)
    objective, _, repair = method.partition("+")
    repair = repair or OBJECTIVES[objective].repair
    teacher, student = (PAIRS[pair].teacher, PAIRS[pair].student) if pair in PAIRS else ("resnet56", "resnet20")
    steps = np.arange(1, recipe.epochs + 1)
    curve = last_top1 * (1 - 0.8 * np.exp(-4 * steps / recipe.epochs))
    curve[-1] = last_top1
    best = recipe.epochs
    if best_above_last > 0 and recipe.epochs > 1:
        best = recipe.epochs - 1
        curve[best - 1] = last_top1 + best_above_last
    images = 50_000 if full else 1000
    record = {
        "synthetic": True, "schema": SCHEMA_VERSION,
        "run_id": f"synthetic-{pair}-{method}-seed{seed}",
        "started": f"2026-01-01T00-00-{seed % 60:02}.000000Z",
        "finished": f"2026-01-01T01-00-{seed % 60:02}.000000Z",
        "parameters": {"pair": pair, "methods": method, "seeds": str(seed), "preset": preset},
        "pair": pair, "teacher": teacher, "student": student,
        "method": {"name": method, "repair": repair, "objective": objective, "settings": {}},
        "seed": seed, "preset": preset, "full_recipe": full, "recipe": asdict(recipe),
        "device": "cpu", "precision": "float32", "teacher_logits": "computed",
        "data": {
            "name": "cifar100" if full else "synthetic",
            "checksum": CIFAR100_CHECKSUM if full else "0" * 64,
            "full_checksum": CIFAR100_CHECKSUM if full else "0" * 64, "train_images": images,
            "test_images": 10_000 if full else 500, "classes": 100},
        "about_teacher": {
            "architecture": teacher, "source": "found",
            "file": "ckpt_epoch_240.pth" if full else "synthetic.safetensors",
            "weights_sha256": "1" * 64, "training": {}, "top1": PUBLISHED_TOP1[teacher]},
        "machine": {"processor": "none", "threads": 1},
        "curve": {
            "epoch": steps.tolist(), "train_loss": np.linspace(4, 1, recipe.epochs).tolist(),
            "train_top1": (curve * 0.9).tolist(), "test_top1": curve.tolist()},
        "result": {
            "last_top1": float(last_top1), "best_top1": float(curve[best - 1]), "best_epoch": best,
            "seconds": 3600.0, "student_sha256": "2" * 64, "training_rows": images * recipe.epochs,
            "teacher_wrong_rows": images * recipe.epochs // 10,
            "changed_rows": images * recipe.epochs // 10 if repair != "none" else 0}}
    if full:
        record["method"] = asdict(method_for(method, PAIRS[pair]))
    return json.loads(json.dumps(record | changes))


def synthetic_records(effects: dict[str, float], generator: np.random.Generator, *, seeds: int = 5,
                      deviation: float = 0.25, objectives: Sequence[str] = ("kd", "dkd"),
                      **settings) -> list[dict]:
    "Of plain and sorted runs: each pair's planted effect of sorting in points, and noise of seeds."
    return [
        synthetic_record(pair, objective + repair, seed, 70 + gain + generator.normal(0, deviation), **settings)
        for pair, effect in effects.items()
        for objective in objectives
        for repair, gain in (("", 0.0), ("+sort", effect))
        for seed in range(seeds)]
