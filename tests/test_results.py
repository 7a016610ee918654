"What a record must say, which runs reach a frame, and which of them can share a table."
import json
import math
import zlib

import numpy as np
import pytest
import torch
from synthetic import changed, synthetic_record, synthetic_records, write_lines

from sortkd.evidence.results import CIFAR100_CHECKSUM, load_results, select, select_paper
from sortkd.evidence.statistics import paired_effects
from sortkd.experiment.record import RecordError, check_record
from sortkd.experiment.run import run_experiment
from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.storage import append_record, read_records, save_correct


def load_lines(path, records, *more):
    return load_results(write_lines(path / "runs.jsonl", records, *more), synthetic=True)


def small(folder, **changes):
    "A small experiment; its teacher is trained once for all tests."
    return prepare_experiment(
        pair="resnet20:resnet8", preset="quick", dataset="digits", train_size=100, test_size=50,
        teachers_dir=f"{folder.parent}/teachers", results_dir=f"{folder}/results", **changes)


def test_what_an_experiment_writes_is_valid(tmp_path):
    experiment = small(tmp_path, methods="ce,kd+sort", epochs=2)
    file = experiment.records_file
    alone, taught = map(check_record, run_experiment(experiment, progress=False).records)
    with pytest.raises(RecordError, match="about_teacher"):
        check_record(taught | {"about_teacher": None})
    frame, left_out = load_results(file)
    assert frame.method.tolist() == ["ce", "kd+sort"] and left_out.empty and len(select(frame)) == 2
    append_record(file, alone)
    assert f"the same run as {alone['run_id']}" in load_results(file)[1].reason[0]
    assert frame.changed_share[1] == frame.wrong_share[1] > 0 and frame.not_paper.notna().all()
    shares = [100 * correct.mean() for correct in frame.correct]
    assert shares == pytest.approx(frame.last_top1.tolist())
    bits = file.with_suffix(".correct") / f"{frame.correct_sha256[0]}.bits"
    bits.write_bytes(zlib.compress(bytes(7)))
    frame, left_out = load_results(file)
    assert frame.method.tolist() == ["kd+sort"] and "not hold the 50 bits" in left_out.reason[0]
    bits.unlink()
    assert load_results(file)[0].correct.map(type).tolist() == [type(None), np.ndarray]


def test_a_run_that_diverges_is_recorded_and_counts(tmp_path):
    for _ in range(2):  # and is not trained again
        experiment = small(tmp_path, methods="ce,kd", epochs=3, recipe="lr=1e30")
        with pytest.raises(FloatingPointError, match="is (nan|inf) in epoch 1.*It is recorded"):
            run_experiment(experiment, progress=False)
        frame, left_out = load_results(tmp_path / "results" / "quick.jsonl")
        assert frame.diverged.tolist() == [True, True] and left_out.empty
    assert frame.last_top1.between(0, 40).all()
    record = read_records(tmp_path / "results" / "quick.jsonl")[0]
    longer = {"diverged": {"epoch": 3, "message": "?"}, "curve": {"epoch": [1]}}
    with pytest.raises(RecordError, match="the number of epochs in curve"):
        check_record(record | longer)


def test_an_accuracy_that_its_images_contradict_is_refused(tmp_path):
    record = synthetic_record("r56_r20", "kd")
    correct = torch.arange(record["data"]["test_images"]) < 100
    record["result"]["correct_sha256"] = save_correct(tmp_path / "runs.jsonl", correct)
    frame, left_out = load_lines(tmp_path, [record])
    assert frame.empty and "has 100 of 500" in left_out.reason[0]


PAPER = synthetic_record(preset="paper")
TRAINED = {"epochs": 240, "train_images": 50_000, "data_checksum": CIFAR100_CHECKSUM}
SHORT = synthetic_record(epochs=5) | {"preset": "paper", "full_recipe": True}
PRETENDERS = [  # records that look like a full run and are not; each with a word of the reason
    ("full_recipe", PAPER | {"full_recipe": False}), ("data", SHORT),
    *((reason, changed(PAPER, path, value)) for reason, path, value in [
        ("preset", "preset", "quick"), ("data", "data.train_images", 49_999),
        ("data", "data.test_images", 500), ("data", "data.checksum", "3" * 64),
        ("recipe", "recipe.batch_size", 128), ("recipe", "recipe.lr", 0.1),
        ("recipe", "recipe.milestones", [100, 200]), ("method", "method.kd_weight", 9.0),
        ("method", "method.settings", {"temperature": 2.0}),
        ("teacher", "about_teacher.training", TRAINED | {"epochs": 10}),
        ("teacher", "about_teacher.training", TRAINED | {"train_images": 400}),
        ("teacher", "about_teacher.training", TRAINED | {"data_checksum": "4"}),
        ("teacher", "about_teacher.file", "mine.pth"), ("teacher", "about_teacher.source", "given"),
        ("teacher", "about_teacher.top1", 60.0)])]


@pytest.mark.parametrize("reason, record", PRETENDERS)
def test_each_pretender_is_found_for_its_reason(reason, record, tmp_path):
    frame, _ = load_lines(tmp_path, [record])
    assert len(frame) == 1 and reason in frame.not_paper[0]
    assert select_paper(frame).empty


def test_a_teacher_trained_in_full_here_serves(tmp_path):
    record = changed(PAPER, "about_teacher.training", TRAINED)
    assert len(select_paper(load_lines(tmp_path, [record])[0])) == 1


def test_nothing_planted_reaches_a_table(tmp_path):
    effects = {"r56_r20": 0.5, "vgg13_vgg8": -0.2}
    clean = synthetic_records(effects, np.random.default_rng(0), preset="paper")
    first = clean[0]
    again = {"run_id": "again", "finished": "2027-01-01T00-00-00.0Z"}
    better = synthetic_record("r56_r20", "kd", 0, 99.0, preset="paper") | again
    foreign = [each | {"seed": 100 + number, "run_id": f"foreign{number}"}
               for number, (_, each) in enumerate(PRETENDERS)]
    broken = [
        changed(first, "result.last_top1", math.nan) | {"seed": 200},
        changed(first, "finished", ...) | {"seed": 201},
        changed(first, "curve.test_top1", first["curve"]["test_top1"][:100]) | {"seed": 202},
        changed(first, "synthetic", ...) | {"seed": 203}, {"rows": []}, [1, 2], "text"]
    cut = json.dumps(clean[1] | {"seed": 204})[:-40]
    dirty = tmp_path / "dirty"
    write_lines(tmp_path / "clean" / "paper.jsonl", clean)
    write_lines(dirty / "a.jsonl", [better, *foreign, *broken], f"{cut}\n", "\xff\n")
    write_lines(dirty / "paper.jsonl", clean, cut)
    write_lines(dirty / "quick.jsonl", [first | {"seed": 300}])
    frame, left_out = load_results(dirty, synthetic=True)
    both = load_results(tmp_path / "clean", synthetic=True)[0], frame
    one, two = map(select_paper, both)
    columns = ["run_id", "last_top1", "best_top1"]
    assert one[columns].equals(two[columns]) and len(one) == len(clean)
    assert len(frame) == len(clean) + len(foreign) and len(left_out) == 1 + len(broken) + 3 + 1
    reasons = left_out.reason.str.cat(sep="\n")
    assert reasons.count("quick runs are no evidence") == 1
    assert reasons.count("the same run as synthetic-r56_r20-kd-seed0, which finished first") == 1
    assert reasons.count("is not a whole record") == 4
    assert "it is not synthetic" in reasons and "required field `finished`" in reasons
    assert len(load_results(dirty)[0]) == 1, "the one without the mark"


@pytest.mark.parametrize("path, value, column", [
    ("data.checksum", "5" * 64, "data_checksum"), ("recipe.batch_size", 32, "recipe"),
    ("recipe.lr", 0.1, "lr"), ("preset", "other", "preset"), ("precision", "bfloat16", "precision"),
    ("about_teacher.weights_sha256", "6" * 64, "teacher_sha256"),
    ("method.settings", {"beta": 1}, "method_settings"), ("data.train_images", 10, "train_images")])
def test_mixed_runs_cannot_be_selected(path, value, column, tmp_path):
    other = changed(synthetic_record(seed=1), path, value)
    frame, _ = load_lines(tmp_path, [synthetic_record(), other])
    with pytest.raises(ValueError, match=f"different values of {column} cannot share a table"):
        select(frame)
    assert len(select(frame, **{column: frame[column].iloc[0]})) == 1


def test_a_folder_without_runs(tmp_path):
    quick, empty = tmp_path / "quick", tmp_path / "empty"
    empty.mkdir()
    write_lines(quick / "quick.jsonl", [synthetic_record()])
    frame, left_out = load_results(quick)
    assert frame.empty and "no evidence" in left_out.reason[0]
    frame, left_out = load_results(empty)
    assert paired_effects(select_paper(frame)).empty and left_out.empty
    with pytest.raises(FileNotFoundError, match="there is no file of records"):
        load_results(tmp_path / "absent.jsonl")


def test_a_frame_says_what_its_record_says(tmp_path):
    record = synthetic_record("vgg13_vgg8", "dkd+sort", 4, 71.0, best_above_last=0.5, epochs=8)
    record["result"] |= {"seconds": 12.0, "teacher_wrong_rows": 2000, "changed_rows": 1000}
    row = load_lines(tmp_path, [record])[0].iloc[0]
    expected = {
        "pair": "vgg13_vgg8", "teacher": "vgg13", "student": "vgg8", "method": "dkd+sort",
        "objective": "dkd", "repair": "sort", "seed": 4, "last_top1": 71.0, "best_top1": 71.5,
        "best_epoch": 7, "seconds": 12.0, "wrong_share": 0.25, "changed_share": 0.125, "epochs": 8,
        "train_images": 1000, "test_images": 500, "precision": "float32"}
    assert {name: row[name] for name in expected} == expected
