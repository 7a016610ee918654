"""Bring records of version 1 into the present form, every number as it was.

    python results/migrate.py results/*.jsonl

A run that began with the code of version 1 also ends with it. Its records do not hold the parameters that repeat the run;
they follow from the other fields. All other lines stay as they are.
"""
import json
import sys
from functools import partial
from pathlib import Path

from sortkd.experiment.pairs import has_published_length
from sortkd.experiment.record import SCHEMA_VERSION, check_record
from sortkd.utils.files import save_atomically


def parameters_of(record: dict) -> dict:
    "The parameters with which the run of a record of version 1 is repeated."
    data, recipe = record["data"], record["recipe"]
    whole = record["preset"] == "paper" and data["checksum"] == data["full_checksum"]
    published = record["full_recipe"] or has_published_length(record)
    changes = record.get("recipe_changes", {})
    return {
        "pair": record["pair"],
        "methods": record["method"]["name"],
        "seeds": str(record["seed"]),
        "preset": record["preset"],
        "dataset": data["name"],
        "epochs": 0 if published else recipe["epochs"],
        "train_size": 0 if whole else data["train_images"],
        "test_size": 0 if whole else data["test_images"],
        "recipe": ",".join(f"{name}={value}" for name, value in changes.items()),
        "device": record["device"],
        "precision": record["precision"],
        "deterministic": record.get("deterministic", False),
        "compile": record.get("compiled", False),
    }


def migrated(line: str) -> str:
    record = json.loads(line)
    if record.get("schema") != 1:
        return line
    if record["method"]["objective"] == "ce":  # the earliest tell of a teacher that was not used
        record |= {"about_teacher": None, "teacher_logits": None}
    head = {name: record[name] for name in ("run_id", "started", "finished") if name in record}
    record["schema"] = SCHEMA_VERSION
    new = {"schema": SCHEMA_VERSION, **head, "parameters": parameters_of(record), **record}
    return json.dumps(check_record(new), ensure_ascii=False, allow_nan=False)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        lines = path.read_text(encoding="utf-8").splitlines()
        text = "".join(f"{migrated(line)}\n" for line in lines)
        save_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))
        print(f"{path}: {len(lines)} lines")
