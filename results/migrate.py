"""Bring files of records into the present form, every number as it was.

    python results/migrate.py results/*.jsonl

A record of version 1 did not hold the parameters that repeat its run; they follow from its other fields
(`sortkd.experiment.record.upgrade`). A line that cannot be read stays as it is.
"""
import json
import sys
from functools import partial
from pathlib import Path

from sortkd.experiment.record import check_record
from sortkd.utils.files import save_atomically


def migrated(line: str) -> str:
    try:
        return json.dumps(check_record(json.loads(line)), ensure_ascii=False, allow_nan=False)
    except ValueError:
        return line


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        lines = path.read_text(encoding="utf-8").splitlines()
        text = "".join(f"{migrated(line)}\n" for line in lines)
        save_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))
        print(f"{path}: {len(lines)} lines")
