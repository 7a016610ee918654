"What a record must say, and how files of records survive damage."
import math
from unittest.mock import Mock

import pytest
from conftest import ROOT
from synthetic import changed, synthetic_record

from sortkd.evidence.results import load_results
from sortkd.experiment.record import RecordError, check_record, parse_record, run_key
from sortkd.experiment.storage import append_record, read_lines, read_records

FILES = [ROOT / "results" / name for name in ("paper.jsonl", "short.jsonl", "repeated/short.jsonl")]
REQUIRED = """
    schema run_id started finished parameters pair teacher student method method.name method.repair
    method.objective seed preset full_recipe recipe recipe.epochs recipe.batch_size recipe.lr device
    precision teacher_logits data data.name data.checksum data.full_checksum data.train_images
    data.test_images data.classes about_teacher about_teacher.architecture about_teacher.source
    about_teacher.file about_teacher.weights_sha256 about_teacher.training about_teacher.top1
    machine machine.threads curve result result.last_top1""".split()


@pytest.mark.parametrize(("path", "value", "words"), [
    *((path, ..., f"record .*`{path.rpartition('.')[2]}`") for path in REQUIRED),
    *((path, ..., path) for path in (  # which only a run that diverged may lack
        "curve.epoch", "curve.test_top1", "result.best_top1", "result.best_epoch",
        "result.student_sha256")),
    ("recipe.epochs", 4, "the number of epochs in curve"),
    ("about_teacher", None, "that there is about_teacher is False, expected True")])
def test_a_field_that_is_missing_or_disagrees_is_named(path, value, words):
    with pytest.raises(RecordError, match=words):
        check_record(changed(synthetic_record(), path, value))


@pytest.mark.parametrize(("path", "value"), [
    ("result.last_top1", math.nan), ("result.seconds", math.inf), ("about_teacher.top1", -math.inf),
    ("curve.train_loss", [1.0, math.nan, 1.0]), ("seed", "0"), ("seed", -1), ("seed", True), ("seed", 0.5),
    ("schema", 3), ("full_recipe", 1), ("recipe.epochs", 0), ("result.best_top1", 100.1), ("data.checksum", "G" * 64),
    ("curve.test_top1", [1.0, None, 2.0]), ("pair", ""), ("machine.threads", 10**9), ("recipe.lr", -0.1),
    ("data.test_images", 10**15), ("result.training_rows", "many"), ("plugins", ["p.py"]), ("started", "soon"),
    ("curve.epoch", [1, 2, 2]), ("curve.more", [1.0]), ("result.last_top1", 69.0),
    ("result.best_epoch", 1)])
def test_every_bad_value_is_named(path, value):
    with pytest.raises(RecordError, match="record synthetic-r56_r20-kd-seed0: ") as error:
        check_record(changed(synthetic_record(), path, value))
    assert path in str(error.value) and "xpected" in str(error.value)


@pytest.mark.parametrize("value", ["a text", None, [], 7, {}, {"run_id": []}, {"schema": 1}])
def test_what_is_no_record_is_refused(value):
    with pytest.raises(RecordError):
        check_record(value)


def test_defaults_are_filled_in_and_other_fields_kept():
    record = synthetic_record(more={"deep": [1.0]})
    parsed = parse_record(record)
    assert check_record(record) is record and record["more"] == {"deep": [1.0]}
    assert (parsed.compiled, parsed.plugins, parsed.synthetic, parsed.machine.gpu) == (False, [], True, None)


def test_a_key_tells_runs_apart_and_nothing_else():
    record = synthetic_record()
    same = {"finished": "2030", "machine": {"threads": 64}, "plan": {"name": "a"}, "students": 3}
    assert all(run_key(record | {name: value}) == run_key(record) for name, value in same.items())
    teacher = record["about_teacher"] | {"top1": 10.0, "file": "moved"}
    assert run_key(record | {"about_teacher": teacher}) == run_key(record)
    others = [("seed", 1), ("recipe.lr", 0.1), ("data.checksum", "3" * 64), ("about_teacher.weights_sha256", "4" * 64),
              ("device", "cuda"), ("precision", "bfloat16"), ("deterministic", True), ("method.settings", {"beta": 1})]
    assert len({run_key(record), *(run_key(changed(record, *each)) for each in others)}) == len(others) + 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_records_of_this_project_are_whole_and_their_runs_keep_their_names(file):
    records = read_records(file)
    assert len(records) == len(file.read_text().splitlines())
    assert all(run_key(record) in record["run_id"] for record in records)
    for record in records:
        method, seed = record["parameters"]["methods"], record["parameters"]["seeds"]
        assert (method, int(seed)) == (record["method"]["name"], record["seed"])


LINES = {
    "lists": b"[" * 1_000_000, "deep record": b'{"run_id": ' + b"[" * 300 + b"]" * 300 + b"}", "nan": b'{"seed": NaN}',
    "digits": b'{"seed": ' + b"9" * 5000 + b"}", "beyond a float": b'{"recipe": {"lr": 1e400}}', "bytes": b"\xff\xfe",
    "null": b"null", "cut": b'{"run_id": "a', "blank": b""}


@pytest.mark.parametrize("name", LINES)
def test_a_damaged_line_hides_no_other(tmp_path, name):
    file, record = tmp_path / "runs.jsonl", synthetic_record()
    append_record(file, record)
    with open(file, "ab") as more:
        more.write(LINES[name])
    append_record(file, changed(record, "seed", 1))
    frame, left_out = load_results(file, synthetic=True)
    assert frame.seed.tolist() == [0, 1] and left_out.line.tolist() == [2] * bool(LINES[name])
    if LINES[name]:
        with pytest.warns(UserWarning, match="line 2, was left out"):
            assert len(read_records(file)) == 2
    assert len([*read_lines(file)]) == 2 + bool(LINES[name])


def test_the_name_of_a_new_file_of_records_is_flushed_to_disk(tmp_path, monkeypatch):
    flush = Mock()
    monkeypatch.setattr("sortkd.experiment.storage.flush_folder", flush)
    for number in range(2):
        append_record(tmp_path / "new.jsonl", {"number": number})
    flush.assert_called_once_with(tmp_path)
