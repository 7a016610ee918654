"What nobody should write into a grid's file, or after sortkd-grid: one line that names it, at once, and nothing written."
import time

import pytest

import sortkd.experiment.grid
from sortkd.experiment.grid import main

GOOD = {"pairs": "[r56_r20]", "methods": "[kd]", "seeds": "1", "preset": "quick", "cell": "command", "threads": "1", "teachers_dir": "t", "results_dir": "r", "cells_dir": "c", "options": "{dataset: digits}"}
VALUES = [
    "null", "true", "[]", "{}", "[null]", "[kd, kd]", "-1", "0", "1.5", ".nan", "1e400", "9" * 5000, "2000000000", "2026-01-01", "!!binary aGk=", '"\\0"', '"\\u202e"',
    '"$(touch planted)"', '""', '" "', "&a [*a]", "x" * 5000, "{", "r: 5", "!!int x", "!!python/object/apply:os.system [touch planted]",
]
FOLDERS = {'"\\u202e"', '"$(touch planted)"', '" "', "1e400"}  # so far as a grid can tell; prepare_experiment looks closer
NOTHING = {"{}", "null", "[]", "0", '""'}


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    "What the command says on standard error, with the grid `text`; `fine` if it would now have looked at what is there."
    def stop(*_):
        raise RuntimeError("fine")

    def ask(text, *arguments):
        (tmp_path / "grid.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        start = time.monotonic()
        assert main(list(arguments or ["grid.yaml"])) == 1
        error = capsys.readouterr().err
        assert time.monotonic() - start < 5 and len(error.splitlines()) == 1 and len(error) < 1000 and error.strip().isprintable(), error[:300]
        assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]
        return error.replace("RuntimeError: fine\n", "fine")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sortkd.experiment.grid, "read_state", stop)
    return ask


def grid(**changes):
    return "\n".join(f"{name}: {value}" for name, value in (GOOD | changes).items())


@pytest.mark.parametrize("name", GOOD)
def test_values_of_a_grid(said, name):
    assert said(grid()) == "fine"
    for value in VALUES:
        answer = said(grid(**{name: value}))
        if name.endswith("_dir") and value in FOLDERS or name == "options" and value in NOTHING or (name, value) == ("threads", "2000000000"):
            assert answer == "fine", value[:40]
        else:
            assert answer != "fine" and (name.rstrip("s") in answer or "grid.yaml is not a YAML file" in answer or "there is no method" in answer), (value[:40], answer[:200])


@pytest.mark.parametrize("name", ["epochs", "deterministic", "teachers_dir", "5", "[a]", "null"])
def test_options_of_a_grid(said, name):
    for value in VALUES:
        if not (name == "deterministic" and value == "true" or name == "epochs" and value in ("0", "2000000000")):
            answer = said(grid(options="{%s: %s}" % (name, value)))
            assert "option" in answer or "grid.yaml is not a YAML file" in answer, (value[:40], answer[:200])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"[]", b"5", b"null", b"&a [*a]", b"[" * 2000, b"? [a]\n: b", b"1: 2", b"null: 2", b"\xef\xbb\xbf", b"--- a\n--- b"], ids=lambda content: repr(content[:10]))
def test_files_that_are_no_grids(said, content):
    assert any(words in said(content) for words in ("grid.yaml is not a YAML file", "give names with values", "a key of the grid is"))


@pytest.mark.parametrize("arguments, words", [
    *((["absent.yaml"], "there is no grid 'absent.yaml'"), (["."], "there is no grid '.'"), (["\0"], "there is no grid"), ([""], "there is no grid")),
    *((["grid.yaml", f"--budget={text}"], "the budget is") for text in ("", "0s", "-1s", "nan", "soon", "9" * 400 + "s", "9" * 5000 + "h", "1s1h", " 5m", "1.5h")),
    *((["grid.yaml", f"--at-once={text}"], "at_once is") for text in ("", "0", "-1", "²", "1.5", "9" * 5000, "many")),
    *((["grid.yaml", f"--option={text}"], "option") for text in ("", "x", "=x", "epochs=", "epochs=-1", "epochs=" + "9" * 5000, "epochs=²", "teachers_dir=x", "deterministic=")),
], ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "")
def test_arguments(said, arguments, words):
    import re
    assert re.search(words, said(grid(), *arguments))
