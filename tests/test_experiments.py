"Whole experiments, small: the notebook, every pair, interruption, refusals, records."
import dataclasses
import fcntl
import json
import subprocess
import sys
from datetime import datetime
from functools import partial
from threading import Thread
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    QUICK_METHODS, ROOT, full_disk, needs_cifar100, save_sample_folder, seeded_network)

from sortkd.evidence.plots import conclude, summarize
from sortkd.evidence.results import load_results
from sortkd.experiment.one_run import prepare_run
from sortkd.experiment.pairs import IMAGENET_PAIRS, PAIRS, method_for, published_recipe, recipe_for
from sortkd.experiment.record import check_record, compare_runs
from sortkd.experiment.repeat import prepare_repetition
from sortkd.experiment.run import run_experiment
from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.storage import append_record, read_lines, read_records
from sortkd.methods import OBJECTIVES, create_method, list_methods
from sortkd.train.augmentation import Batches
from sortkd.train.devices import create_fabric
from sortkd.train.images import load_digits
from sortkd.train.networks import create_model
from sortkd.train.teachers import read_checkpoint, save_teacher, weights_checksum
from sortkd.train.trainer import Outcome, Recipe, train, train_together
from sortkd.utils.files import save_atomically

NOTEBOOK = ROOT / "nbs" / "run_experiment.ipynb"
SMALL = {"pair": "resnet20:resnet8", "methods": "kd,kd+sort", "preset": "quick",
         "dataset": "digits", "epochs": 2, "train_size": 100, "test_size": 60}
PUBLISHED = {"pair": "r56_r20", "preset": "paper", "dataset": "cifar100", "epochs": 0,
             "train_size": 0, "test_size": 0}
run = partial(run_experiment, progress=False)


def small(folder, **changes):
    folders = {"teachers_dir": f"{folder}/teachers", "results_dir": f"{folder}/results"}
    return prepare_experiment(**SMALL | folders | changes)


def run_new(folder, **changes):
    return run(small(folder, **changes))


def names(records):
    return [record["method"]["name"] for record in records]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Shared, so that the teacher is trained once."
    return tmp_path_factory.mktemp("experiments")


def test_the_notebook_through_papermill(folder):
    import papermill
    results = folder / "papermill"
    folders = {"results_dir": str(results), "teachers_dir": str(folder / "teachers")}
    changes = {"methods": "kd,kd+sort,dkd+swap", "seeds": "0,1", "epochs": 1, "progress": False}
    parameters, out = SMALL | folders | changes, folder / "out.ipynb"
    notebook = papermill.execute_notebook(NOTEBOOK, out, parameters, progress_bar=False)
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    first = shown[0]
    words = first[0]["data"]["text/markdown"]
    assert all(part in words for part in ("kd+sort minus kd", "(n = 2 seeds)", "Chance is 10 %", "This is a quick run", "not evidence"))
    assert "top-1 last" in first[1]["data"]["text/html"] and "image/png" in first[2]["data"]
    records = read_records(results / "quick.jsonl")
    assert names(records) == ["kd", "kd+sort", "dkd+swap"] * 2
    assert [record["seed"] for record in records] == [0, 0, 0, 1, 1, 1]


def test_a_result_is_of_the_last_epoch_and_of_the_best(folder, tmp_path, monkeypatch):
    "Of a run whose first epoch was the best."
    def train_and_change(*arguments, **options):
        outcome, = train_together(*arguments, **options)
        counts = zip(outcome.curve, (60.0, 50.0), (30, 20), (3, 2), strict=True)
        for row, top1, wrong, changed in counts:
            row |= {"test_top1": top1, "teacher_wrong_rows": wrong, "changed_rows": changed}
        outcome.best_weights = {name: value + 1 for name, value in outcome.last_weights.items()}
        outcomes.append(outcome)
        return [outcome]

    outcomes = []
    run_new(folder, methods="kd", epochs=1)  # trains the teacher, if no other test has
    monkeypatch.setattr("sortkd.experiment.one_run.train_together", train_and_change)
    record, = run_new(folder, methods="kd", results_dir=tmp_path).records
    result, outcome = record["result"], outcomes[0]
    expected = {"last_top1": 50.0, "best_top1": 60.0, "best_epoch": 1, "training_rows": 200,
                "last_test_loss": outcome.curve[1]["test_loss"], "teacher_wrong_rows": 50,
                "changed_rows": 5, "student_sha256": weights_checksum(outcome.last_weights)}
    assert {name: result[name] for name in expected} == expected
    for name, kept in (("last", outcome.last_weights), ("best", outcome.best_weights)):
        path, = tmp_path.rglob(f"{name}.safetensors")
        assert weights_checksum(read_checkpoint(path)[0]) == weights_checksum(kept)


def test_a_writer_waits_for_another(tmp_path):
    path = tmp_path / "records.jsonl"
    with open(path, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = Thread(target=append_record, args=(path, {"number": 1}))
        writer.start()
        writer.join(0.5)
        assert writer.is_alive() and not path.read_text()
    writer.join(60)
    assert [*read_lines(path)] == [(1, {"number": 1})]


def test_the_result_in_words():
    def record(name, seed, top1):
        return {"pair": "a", "teacher": "t", "student": "s", "seed": seed,
                "data": {"test_images": 400, "classes": 10}, "result": {"last_top1": top1},
                "method": {"name": name, "objective": "kd", "repair": "none"}}

    top1s = {"ce": 50.0, "kd": 52.0, "kd+sort": 53.0}
    records = [record(name, seed, top1s[name] + seed) for name in top1s for seed in (0, 1)]
    words = conclude(records)
    assert "kd minus ce: +2.00 points of top-1, 95 % interval +2.00 to +2.00 (n = 2" in words
    assert "kd+sort minus kd: +1.00" in words and "Chance is 10 %" in words
    assert "A top-1 of 52.2 % on 400 test images has a 95 % interval of 47.4 to 57.1 %." in words
    assert "95 % interval of 0.0 to 1.0 %" in conclude([record("ce", 0, 0.0)])


@needs_cifar100
@pytest.mark.slow
@pytest.mark.parametrize("pair", ["r32x4_r8x4", "r56_r20", "vgg13_vgg8"])
def test_the_first_run_convinces(pair, tmp_path):
    "Every student at five times chance or more."
    experiment = prepare_experiment(pair=pair, preset="quick", teachers_dir=str(tmp_path / "teachers"), results_dir=tmp_path)
    assert all(record["result"]["last_top1"] >= 50 for record in run(experiment).records)


def test_rows_are_counted_of_methods_that_train_longer(folder, tmp_path, monkeypatch):
    "At the published length, where MLKD has 480 epochs and KD has 240."
    def untrained(students, *arguments, **options):
        row = {"test_top1": 10.0, "test_loss": 1.0, "teacher_wrong_rows": images // 2, "changed_rows": 0}
        return [Outcome([{"epoch": number, **row} for number in range(1, each.recipe.epochs + 1)],
                        each.model.state_dict(), each.model.state_dict()) for each in students]

    run_new(folder, methods="kd", epochs=1)  # trains the teacher, if no other test has
    plan = small(folder, methods="kd,mlkd", train_size=0, test_size=0, results_dir=tmp_path)
    plan, images = dataclasses.replace(plan, preset_name="paper", recipe=Recipe()), len(plan.full_data.train_targets)
    monkeypatch.setattr("sortkd.experiment.one_run.train_together", untrained)
    records = run(plan).records
    assert [record["result"]["training_rows"] for record in records] == [images * 240, images * 480]
    assert {summarize([record])["teacher wrong"].item() for record in records} == {"50.0%"}


@pytest.mark.parametrize("changes,full", [
    ({}, True), ({"epochs": 240}, True), ({"train_size": 400, "test_size": 100}, True), ({"methods": "ce,mlkd"}, True),
    ({"epochs": 239}, False), ({"epochs": 480, "methods": "mlkd"}, False), ({"train_size": 399}, False),
    ({"test_size": 99}, False), ({"recipe": "lr=0.1"}, False), ({"recipe": "weight_decay=0"}, False),
    ({"preset": "short", "epochs": 240, "train_size": 400}, False), ({"preset": "quick"}, False)])
def test_a_changed_recipe_is_not_called_the_published_one(folder, monkeypatch, changes, full):
    "On images that say that they are all of CIFAR-100; nor is a pair or a number of one's own."
    data = dataclasses.replace(load_digits().subset(400, 100), name="cifar100")
    monkeypatch.setattr("sortkd.experiment.setup.load_data", lambda name: data)
    plan = small(folder, **PUBLISHED | changes)
    assert plan.is_full_recipe == full == ("can be compared with published ones" in plan.describe())
    assert prepare_run(plan, plan.methods[0], 0, "cached", None).facts["full_recipe"] == full
    for own in ({"pair": "resnet20:resnet8"}, {"methods": "ce,kd(temperature=2)"}):
        assert "compared with published ones" not in small(folder, **PUBLISHED | changes | own).describe()


def test_kept_and_computed_teacher_logits(folder, tmp_path):
    found = {cache: run_new(folder, methods="ce,kd+sort", precision="float32", cache=cache, results_dir=tmp_path / cache).records
             for cache in ("auto", "full", "off")}
    kinds = {cache: [record["teacher_logits"] for record in records] for cache, records in found.items()}
    assert kinds == {"auto": [None, "cached"], "full": [None, "cached"], "off": [None, "computed"]}
    auto, full, off = ([record["result"]["student_sha256"] for record in records]
                       for records in found.values())
    assert auto == full and auto[0] == off[0] and auto[1] != off[1]
    auto, off = found["auto"][1], found["off"][1]
    assert auto["curve"]["train_loss"] == pytest.approx(off["curve"]["train_loss"], rel=0.01)
    assert auto["result"]["teacher_wrong_rows"] == pytest.approx(off["result"]["teacher_wrong_rows"], abs=3)
    assert (tmp_path / "auto" / "teacher_logits").is_dir()
    assert not (tmp_path / "off" / "teacher_logits").exists()


def test_without_room_the_logits_are_computed(folder, tmp_path, capsys):
    experiment = small(folder, methods="kd", results_dir=tmp_path, cache_dir=str(tmp_path / "logits"))
    (tmp_path / "logits").write_text("a file in the way")
    assert run(experiment).records[0]["teacher_logits"] == "computed"
    assert "are not cached" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is paper on a GPU")
def test_without_a_gpu_the_preset_is_quick(folder, tmp_path):
    assert small(folder, preset="auto", results_dir=tmp_path).preset_name == "quick"


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_every_method(folder, tmp_path, which):
    "All objectives by themselves and all repairs with kd, or all combinations that make sense: the record is whole."
    names = QUICK_METHODS if which == "some" else list_methods()
    experiment = small(folder, methods=",".join(names), epochs=3, train_size=128, cache="full", results_dir=tmp_path)
    records = run(experiment).records
    assert [check_record(record)["method"]["name"] for record in records] == names
    for record in records:
        losses, method = record["curve"]["train_loss"], record["method"]
        # six steps, in which smooth's first losses may rise; that every loss falls is tested with the methods
        if method["objective"] in ("ce", "kd") and method["repair"] != "smooth":
            assert min(losses[1:]) < losses[0], (method["name"], losses)
        objective = OBJECTIVES[method["objective"]]
        lr = min(0.05, objective.lr) * (0.01 if "mlkd" in method["name"] else 1)
        assert ("strong_views" in record) == objective.strong_views
        assert record["recipe"]["lr"] == pytest.approx(lr)
        if objective.learns_temperature:  # it is raised against the student, once the curriculum has begun
            temperatures = record["curve"]["temperature"]
            assert len(set(temperatures)) == 3 and all(1 < temperature < 21 for temperature in temperatures)
        if record["method"]["objective"] != "ce":
            changed, wrong = (record["result"][name] for name in ("changed_rows", "teacher_wrong_rows"))
            repaired = 0 if method["repair"] == "none" else wrong
            # MFT changes right rows, too.
            assert wrong > 0
            assert changed > wrong if method["repair"] == "mft" else changed == repaired


def test_a_recorded_run_is_not_run_again(folder, tmp_path):
    results = str(tmp_path / "results")
    records = run_new(folder, seeds="0,1", results_dir=results).records
    again = run_new(folder, seeds="0,1,2", results_dir=results).records
    assert [record["run_id"] for record in again[:4]] == [record["run_id"] for record in records] and len(again) == 6
    assert len(read_records(tmp_path / "results" / "quick.jsonl")) == 6
    with pytest.MonkeyPatch.context() as patch:  # nor is its teacher looked at
        patch.setattr("sortkd.experiment.run.evaluate", None)
        assert run_new(folder, seeds="0,1,2", results_dir=results).appended == 0
    other = run_new(folder, epochs=1, results_dir=results).records
    assert other[0]["run_id"] not in {record["run_id"] for record in again}, "another length is another run"
    run_new(folder, results_dir=results, again=True)
    assert len(read_records(tmp_path / "results" / "quick.jsonl")) == 10, "unless it is asked for"


def test_without_a_teacher(folder, tmp_path, monkeypatch):
    "Cross-entropy alone: no teacher is made, loaded or recorded, and another teacher makes no other run."
    results = str(tmp_path / "results")
    alone = small(tmp_path, methods="ce", epochs=1, teacher="nowhere.pt")
    with monkeypatch.context() as patch:
        for name in ("teacher.get_teacher", "teacher.load_teacher", "run.evaluate"):
            patch.setattr(f"sortkd.experiment.{name}", None)
        done = run(alone)
        record, = done.records
        assert record["about_teacher"] is None and record["teacher"] == "resnet20" and not (tmp_path / "teachers").exists()
        assert done.describe_teacher() == "No method used a teacher."
        assert "resnet8 is trained alone" in alone.describe()
        again, = run(prepare_repetition(record, results_dir=tmp_path / "repeated")).records
        assert compare_runs(record, again) == []
    beside = run_new(folder, methods="kd,ce", epochs=1, results_dir=results)
    assert beside.appended == 1 and beside.records[1]["run_id"] == record["run_id"] and "is right on" in beside.describe_teacher()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    "Images laid out like ImageNet, and a teacher for each pair that has not learned anything."
    root = tmp_path_factory.mktemp("photographs")
    save_sample_folder(root / "imagenet", train=5, test=2)
    for name, pair in IMAGENET_PAIRS.items():
        save_teacher(root / f"{name}.safetensors", seeded_network(pair.teacher, 4).state_dict(), {})
    return root


@pytest.mark.slow
def test_imagenet_through_the_notebook(photographs, monkeypatch):
    import papermill
    monkeypatch.setenv("SORTKD_DATA", str(photographs))
    parameters = {"pair": "in_r34_r18", "preset": "quick", "epochs": 1, "results_dir": str(photographs / "results"),
                  "teacher": str(photographs / "in_r34_r18.safetensors"), "progress": False}
    papermill.execute_notebook(NOTEBOOK, photographs / "out.ipynb", parameters, progress_bar=False)
    alone, kd, sort = read_records(photographs / "results" / "quick.jsonl")
    assert names((alone, kd, sort)) == ["ce", "kd", "kd+sort"] and not kd["full_recipe"]
    assert kd["method"]["settings"] == {"temperature": 1.0} and kd["method"]["ce_weight"] == 0.5
    assert kd["recipe"]["weight_decay"] == 1e-4 and kd["recipe"]["batch_size"] == 16
    assert sort["result"]["changed_rows"] == sort["result"]["teacher_wrong_rows"] > 0 == kd["result"]["changed_rows"]
    assert kd["teacher_logits"] == "computed" and kd["data"]["classes"] == 4


def test_the_imagenet_recipe_is_the_papers(photographs, monkeypatch):
    monkeypatch.setenv("SORTKD_DATA", str(photographs))
    plan = prepare_experiment(pair="in_r34_r18", methods="kd,dkd", preset="paper")
    assert (plan.recipe.epochs, plan.recipe.batch_size, plan.recipe.lr, plan.recipe.milestones) == (100, 512, 0.2, (30, 60, 90))
    assert plan.methods[1].warmup_epochs == 1 and plan.preset.fetch_teacher
    other, = prepare_experiment(pair="in_r50_mv1", methods="dkd+sort", preset="quick").methods
    assert other.settings == {"alpha": 1.0, "beta": 2.0, "temperature": 1.0}
    assert not plan.is_full_recipe and "not with published ones" in plan.describe(), "twenty images are not ImageNet, whatever their folder is called"
    for wrong, words in (({"methods": "mlkd"}, "strongly augmented"), ({"preset": "short"}, "preset is 'short'"), ({"dataset": "digits"}, "imagenet")):
        with pytest.raises(ValueError, match=words):
            prepare_experiment(**({"pair": "in_r34_r18", "preset": "quick"} | wrong))


def stop_in(times):
    "A callback that interrupts when it is called for the `times`-th time, as Ctrl-C would."
    return Mock(side_effect=[*[None] * (times - 1), KeyboardInterrupt])


def test_an_interrupted_command_takes_what_it_has_recorded(folder, tmp_path):
    settings = {"methods": "kd,kd+sort", "seeds": "0,1", "epochs": 3}
    whole = run_new(folder, **settings, results_dir=tmp_path / "whole").records
    experiment = small(folder, **settings, results_dir=tmp_path / "broken")
    for told in (4, 4):  # of two methods each: the second epoch of seed 0, then the first of seed 1
        with pytest.raises(KeyboardInterrupt):
            run(experiment, callbacks=[stop_in(told)])
    records = run(experiment).records
    written = read_records(tmp_path / "broken" / "quick.jsonl")
    assert [each["run_id"] for each in written] == [each["run_id"] for each in records] and len(written) == 4
    assert not any(map(compare_runs, whole, records))
    assert any([session["first_epoch"] for session in each.get("sessions", [])] == [1, 2] for each in written)
    for each in written:
        times = [each["started"], *(session["began"] for session in each.get("sessions", [])), each["finished"]]
        assert times == sorted(times) and all(session["machine"] == whole[0]["machine"] for session in each.get("sessions", []))
    left = {path.name for path in (tmp_path / "broken" / "runs").rglob("*") if path.is_file()}
    assert left == {"last.safetensors", "best.safetensors", "run.lock"}


def test_the_first_start_survives_every_way_of_continuing(folder, tmp_path):
    "Begun with two seeds and two methods, continued with one of each and with both: a record's training fits between its times."
    def go_on(*callbacks, **changes):
        experiment = small(folder, **({"methods": "kd,kd+sort", "seeds": "0,1", "epochs": 3, "results_dir": tmp_path} | changes))
        return run(experiment, callbacks=callbacks).records

    with pytest.raises(KeyboardInterrupt):
        go_on(stop_in(1))
    first = {path.parent.name: path.read_text() for path in tmp_path.rglob("started")}
    for changes in ({"methods": "kd", "seeds": "0"}, {"seeds": "0"}):
        with pytest.raises(KeyboardInterrupt):
            go_on(stop_in(1), **changes)
    records = go_on(methods="kd+sort", seeds="0") + go_on(seeds="0") + go_on()
    times = {record["run_id"].removesuffix(f"-{record['started']}"): record["started"] for record in records}
    assert len(first) == 2 and len(times) == 4 and {name: times[name] for name in first} == first
    for record in records:
        began, ended = (datetime.strptime(record[name], "%Y-%m-%dT%H-%M-%S.%fZ") for name in ("started", "finished"))
        assert record["result"]["seconds"] <= (ended - began).total_seconds()


def test_a_full_disk_leaves_the_records_as_they_were(tmp_path):
    file = tmp_path / "records.jsonl"
    append_record(file, {"number": 1})
    before = file.read_bytes()
    with full_disk(1000):
        with pytest.raises(OSError, match="as it was.*give the same command again"):
            append_record(file, {"filling": "x" * 5000})
        with pytest.raises(OSError, match="kept.txt could not be written.*Free space"):
            save_atomically(tmp_path / "kept.txt", lambda path: path.write_text("x" * 5000))
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_on_a_gpu_runs_of_several_seeds_are_taught_together(folder, tmp_path, monkeypatch):
    shared = {"methods": "kd,kd+sort", "seeds": "0,1,2", "epochs": 1}
    alone = small(folder, **shared, results_dir=tmp_path / "alone")
    together = small(folder, **shared, results_dir=tmp_path / "together")
    alone = run(alone).records
    monkeypatch.setattr("sortkd.experiment.run.create_fabric", lambda *_: create_fabric("cpu", together.precision))
    monkeypatch.setattr("sortkd.experiment.run.STUDENTS_AT_ONCE", 4)
    together = run(dataclasses.replace(together, device="cuda")).records
    assert [each["students"] for each in alone] == [2] * 6
    assert [each["students"] for each in together] == [4, 4, 4, 4, 2, 2]
    for one, other in zip(alone, together):
        assert (one["seed"], one["method"]) == (other["seed"], other["method"]) and other["device"] == "cuda"
        assert one["result"]["student_sha256"] == other["result"]["student_sha256"]


def test_a_record_is_enough_to_repeat_its_run(folder, tmp_path):
    for changes in ({"methods": "dkd+sort", "cache": "off", "seeds": "5"}, {"methods": "mlkd", "precision": "float32"}):
        record, = run_new(folder, **changes, results_dir=tmp_path / "results").records
        torch.set_num_threads(2)  # the record knows better
        again = prepare_repetition(json.loads(json.dumps(record)), teachers_dir=folder / "teachers", results_dir=tmp_path / "repeated")
        assert torch.get_num_threads() == 1 and again.teacher_file.name == record["about_teacher"]["file"]
        repeated, = run(again).records
        assert compare_runs(record, repeated) == []
    assert len(read_records(tmp_path / "repeated" / "quick.jsonl")) == 2


def test_a_pair_and_numbers_of_one_s_own(folder, tmp_path):
    "Two networks, a temperature and a recipe that no paper has: in the records, and repeated from one of them."
    own = small(folder, pair="resnet20:resnet8", methods="kd(temperature=2)+sort,kd", recipe="lr=0.02,batch_size=32", results_dir=tmp_path / "results")
    assert not own.is_full_recipe and own.pair.lr == 0.05
    changed, usual = run(own).records
    assert (changed["pair"], changed["teacher"], changed["student"]) == ("resnet20:resnet8", "resnet20", "resnet8")
    assert changed["method"]["name"] == "kd(temperature=2)+sort" and changed["method"]["settings"] == {"temperature": 2.0} and usual["method"]["name"] == "kd"
    assert (changed["recipe"]["lr"], changed["recipe"]["batch_size"]) == (0.02, 32) and changed["recipe_changes"] == {"lr": 0.02, "batch_size": 32}
    assert changed["students"] == 2
    frame, _ = load_results(tmp_path / "results" / "quick.jsonl")
    assert list(frame.sort_values("method").method) == ["kd", "kd(temperature=2)+sort"] and frame.not_paper.notna().all()
    again = prepare_repetition(changed, teachers_dir=folder / "teachers", results_dir=tmp_path / "repeated")
    repeated, = run(again).records
    assert compare_runs(changed, repeated) == [] and "students" not in repeated


@pytest.mark.parametrize("library, name", [("timm", "resnet10t"), ("torchvision", "mobilenet_v3_small")])
def test_a_student_from_another_library(library, name, folder, tmp_path):
    pytest.importorskip(library)
    # float32: oneDNN's bfloat16 gradient of a strided convolution of one pixel is NaN now and then
    record, = run_new(folder, pair=f"resnet20:{library}:{name}", methods="kd", epochs=1, train_size=20, test_size=10,
                      precision="float32", results_dir=tmp_path / "results").records
    assert record["student"] == f"{library}:{name}"


def test_another_run_than_the_recorded_one_is_refused(folder, tmp_path):
    record, = run_new(folder, methods="kd", results_dir=tmp_path / "results").records
    def repeat(**changes): return prepare_repetition(record | changes, teachers_dir=str(folder / "teachers"), results_dir=tmp_path / "repeated")
    for changes, words in (({"method": record["method"] | {"kd_weight": 0.5}}, "method.kd_weight is 0.9 here and 0.5 there"),
                           ({"data": record["data"] | {"checksum": "0" * 64}}, "data.checksum"), ({"recipe": None}, "Expected `object`, got `null`")):
        with pytest.raises(ValueError, match=words):
            repeat(**changes)
    other = run_new(folder, methods="kd", seeds="1", results_dir=tmp_path / "results").records[0]
    assert "weights differ" in compare_runs(record, other)[0]


def test_a_compiled_run_says_so(folder, tmp_path, monkeypatch):
    "With the compiler that only traces: the numbers are those of an eager run, whose record is another one all the same."
    compile_network = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_network(self, **options, backend="eager"))
    eager, compiled = (run_new(folder, methods="kd+sort", compile=each, results_dir=tmp_path).records[0]
                       for each in (False, True))
    assert "compiled" not in eager and compiled["compiled"] is True and not compare_runs(eager, compiled)
    found, _ = load_results([tmp_path / "quick.jsonl"])
    assert {*found["precision"]} == {eager["precision"], f"{eager['precision']}, compiled"}  # which do not share a table
    again = prepare_repetition(compiled, teachers_dir=folder / "teachers", results_dir=tmp_path / "repeated")
    assert again.compile


@pytest.mark.cuda
def test_deterministic_on_a_gpu(folder, tmp_path):
    experiment = small(folder, methods="kd,dkd+sort", device="cuda", deterministic=True, results_dir=tmp_path)
    one, two = run(experiment).records, run(experiment).records
    assert not any(map(compare_runs, one, two)) and one[0]["deterministic"] is True


@pytest.mark.parametrize("pair,name,numbers", [  # of LSKD's logs, SLD's code, MLKD's logs
    ("r56_r20", "lskd_dkd", dict(temperature=3, kd_weight=18, beta=2)),
    ("wrn40_2_wrn16_2", "lskd_dkd", dict(temperature=2, kd_weight=12, beta=2)),
    ("vgg13_mv2", "lskd_dkd", dict(temperature=3, kd_weight=9, beta=2)),
    ("r32x4_shuv2", "lskd_dkd", dict(temperature=2, kd_weight=9, beta=8)),
    ("vgg13_vgg8", "lskd+sort", dict(temperature=3, kd_weight=9)),
    ("r50_mv2", "lskd", dict(temperature=3, kd_weight=1)),
    ("vgg13_vgg8", "lskd_mlkd", dict(kd_weight=6, lr=0.01, epochs=480)),
    ("r32x4_shuv1", "lskd_mlkd", dict(kd_weight=9, epochs=960)),
    ("r56_r20", "lskd_mlkd", dict(kd_weight=9, lr=0.025, epochs=480)),
    ("r32x4_shuv1", "mlkd", dict(epochs=960)), ("r32x4_shuv2", "mlkd+sort", dict(epochs=960)),
    ("wrn40_2_shuv1", "mlkd", dict(epochs=480)), ("r56_r20", "sld", dict(lr=0.025, epochs=240)),
    ("r32x4_shuv1", "sld", dict(lr=0.009)), ("wrn40_2_shuv1", "sld+sort", dict(lr=0.01)),
    ("r50_mv2", "sld", dict(lr=0.008)),
    ("wrn40_2_wrn16_2", "dkd", dict(beta=6, kd_weight=1, temperature=4, lr=0.05)),
    ("r56_r20", "ctkd_dkd", dict(beta=2)), ("r32x4_r8x4", "ctkd_dkd", dict(beta=2))])
def test_numbers_of_a_pair(pair, name, numbers):
    method = method_for(name, PAIRS[pair])
    recipe = recipe_for(method, PAIRS[pair], published_recipe(PAIRS[pair]), True)
    assert recipe.milestones == (150, 180, 210)
    stated = {**method.settings, "kd_weight": method.kd_weight, "lr": recipe.lr, "epochs": recipe.epochs}
    assert {key: stated[key] for key in numbers} == numbers


def test_a_record_that_is_not_whole_blocks_no_run(folder, tmp_path):
    settings = {"methods": "ce", "epochs": 1, "results_dir": tmp_path}
    record, = run_new(folder, **settings).records
    damaged = {key: value for key, value in record.items() if key != "curve"}
    (tmp_path / "quick.jsonl").write_text(json.dumps(damaged) + "\n")
    with pytest.warns(UserWarning, match="line 1, was left out"):
        results = run_new(folder, **settings)
    assert results.appended == 1 and compare_runs(record, results.records[0]) == []
    with pytest.raises(ValueError, match="`curve`"):
        prepare_repetition(damaged)


def test_import_needs_torch_and_nothing_else():
    "Nor do experiments load large packages that they do not use."
    code = """import sys, torch
before = set(sys.modules)
import sortkd
print({name.split('.')[0] for name in set(sys.modules) - before})
from sortkd.train.devices import create_fabric
create_fabric("cpu")
import sortkd.experiment.run, sortkd.evidence.plots
large = "torchmetrics torchvision transformers scipy sklearn matplotlib pandas PIL"
print({*large.split()} & set(sys.modules))"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "{'sortkd'}\nset()\n"


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_takes_a_step(pair):
    data = load_digits().subset(train_size=40, test_size=20)
    teacher, student = create_model(PAIRS[pair].teacher, 10), create_model(PAIRS[pair].student, 10)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    method = create_method("dkd+sort", beta=PAIRS[pair].beta)
    recipe = Recipe(lr=PAIRS[pair].lr, batch_size=40).shortened(1)
    outcome = train(student, Batches(data), method, recipe, create_fabric("cpu"), teacher=teacher)
    after = outcome.last_weights
    assert all(value.isfinite().all() for value in after.values())
    trained = [name for name, _ in student.named_parameters() if name.endswith("weight")]
    assert not any(torch.equal(before[name], after[name]) for name in trained)


@needs_cifar100
def test_real_cifar100(tmp_path):
    "The documented CIFAR-100 command, much smaller."
    experiment = small(
        tmp_path, pair="r56_r20", dataset="cifar100", epochs=1, train_size=64, test_size=50)
    records = run(experiment).records
    data = records[0]["data"]
    assert (data["full_checksum"], data["train_images"]) == (experiment.full_data.checksum, 64)
    assert records[1]["result"]["changed_rows"] == records[1]["result"]["teacher_wrong_rows"] > 0


@pytest.mark.slow
def test_the_same_command_twice_at_once(folder, tmp_path):
    code = ("import sys, torch; torch.set_num_threads(1); from sortkd.fronts.commands import run\n"
            f"sys.exit(run('--pair resnet20:resnet8 --dataset digits --preset quick --methods kd,kd+sort --epochs 2 --train-size 100 --test-size 60 --quiet --teachers-dir {folder}/teachers --results-dir {tmp_path}'.split()))")
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [each.wait(timeout=200) for each in started] == [0, 0]
    records = read_records(tmp_path / "quick.jsonl")
    assert sorted(names(records)) == ["kd", "kd+sort"]
    assert len({record["result"]["student_sha256"] for record in records}) == 2
