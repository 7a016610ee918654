"What is refused, what is left out of tables, and whether the statistics hold what they promise."

import itertools
import json
import math
import os
import re
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.pairs import PAIRS
from sortkd.evidence.plots import summarize
from sortkd.experiment.storage import append_record, read_correct, read_records, save_correct
from sortkd.experiment.run import run_experiment
from sortkd.evidence.results import (
    load_curves,
    CIFAR100_CHECKSUM,
    load_results,
    select,
    select_paper,
)
from sortkd.experiment.record import RECORD_SCHEMA, RecordError, check_record, whole
from sortkd.evidence.statistics import (
    confidence_sequence, crossed_interval, paired_effects, pool_effects, seed_deviation, seeds_needed, sign_flip_test, smallest_number,
    t_test_power, verdict_probabilities, verdicts,
)
from sortkd.evidence.tables import comparison_title, comparison_table, effect_table, read_reported, write_table
from synthetic import synthetic_record, synthetic_records

NOTEBOOKS = Path(__file__).parents[1] / "nbs"
REPORTED = read_reported(NOTEBOOKS / "assets" / "reported.csv")


def write_lines(path, records, *more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records) + "".join(more))
    return path


def changed(record, path, value):
    "A copy of `record` with another value at the dotted `path`; `None` removes it."
    copy = json.loads(json.dumps(record))
    *parents, name = path.split(".")
    place = copy
    for each in parents:
        place = place[each]
    if value is None:
        del place[name]
    else:
        place[name] = value
    return copy


# What a record must say


def required_fields(schema=RECORD_SCHEMA, path=()):
    for name, field in schema.get("properties", {}).items():
        if name not in schema["required"]:
            continue
        yield ".".join((*path, name))
        yield from required_fields(field, (*path, name))


def test_a_synthetic_record_is_a_record():
    for preset, method in itertools.product(("synthetic", "paper"), ("kd", "kd+sort", "dkd", "dkd+sort")):
        record = synthetic_record("vgg13_vgg8", method, 3, 61.25, preset=preset)
        assert check_record(record) is record and record["synthetic"] is True


@pytest.mark.parametrize("path", list(required_fields()))
def test_every_missing_field_is_named(path):
    with pytest.raises(RecordError, match="record ") as error:
        check_record(changed(synthetic_record(), path, None))
    assert f"{path} is 'missing', expected" in str(error.value)


@pytest.mark.parametrize(
    "path, value",
    [
        ("result.last_top1", math.nan),
        ("result.seconds", math.inf),
        ("about_teacher.top1", -math.inf),
        ("curve.train_loss", [1.0, math.nan, 1.0]),
        ("seed", "0"),
        ("seed", -1),
        ("seed", True),
        ("seed", 0.5),
        ("schema", 2),
        ("schema", "1"),
        ("full_recipe", 1),
        ("recipe.epochs", 0),
        ("result.best_top1", 100.1),
        ("data.checksum", "G" * 64),
        ("curve.test_top1", []),
        ("curve.test_top1", [1.0, None, 2.0]),
        ("pair", ""),
        ("machine.threads", 10**9),
        ("recipe.epochs", 10**12),
        ("recipe.lr", 10**400),
        ("seed", 10**4000),
        ("data.test_images", 10**15),
        ("data.checksum", "0" * 64 + "\n"),
        ("about_teacher.training.epochs", "240"),
        ("curve.more", [None]),
        ("result.training_rows", "many"),
        ("plugins", ["p.py"]),
        ("started", "soon"),
    ],
)
def test_every_bad_value_is_named(path, value):
    with pytest.raises(RecordError) as error:
        check_record(changed(synthetic_record(), path, value))
    assert (
        "record synthetic-r56_r20-kd-seed0: " in str(error.value)
        and path in str(error.value)
        and "expected" in str(error.value)
    )


@pytest.mark.parametrize(
    "path, value",
    [
        ("recipe.epochs", 4),
        ("curve.epoch", [1, 2, 2]),
        ("result.last_top1", 69.0),
        ("result.best_epoch", 1),
        ("method.repair", "sort"),
        ("about_teacher.architecture", "vgg13"),
        ("student", "resnet32"),
    ],
)
def test_parts_that_disagree_are_found(path, value):
    with pytest.raises(RecordError, match="expected"):
        check_record(changed(synthetic_record(), path, value))


def test_a_number_that_is_none_is_found_wherever_it_hides():
    with pytest.raises(RecordError, match="more.deep.1 is 'NaN or infinite'"):
        check_record(synthetic_record(more={"deep": [1.0, 2.0]}) | {"more": {"deep": [1.0, math.nan]}})
    nested = []
    for _ in range(5000):
        nested = [nested]
    for value in ("a text", None, [], 7, nested, {"run_id": nested}, {"run_id": "only"}):
        with pytest.raises(RecordError):
            check_record(value)


def leaves(value, path=()):
    "Paths to all parts of nested values."
    for key, part in value.items() if isinstance(value, dict) else ():
        yield ".".join((*path, key))
        yield from leaves(part, (*path, key))


def test_no_value_anywhere_ends_in_a_traceback(tmp_path):
    "Each part of a record and of what else it may hold, replaced by values of every kind; each line is used or named."
    record = synthetic_record() | {"plugins": [], "recipe_changes": {}, "commit": "c", "compiled": False}
    record["about_teacher"]["training"] = {"epochs": 240, "train_images": 50_000}
    strange = ("", "\x1b[2J\n<b>", [], {}, [[1]], True, -1, 0.5, 10**300, 1e308, {"a": None})
    lines = [changed(record, path, value) for path in leaves(record) for value in strange]
    frame, left_out = load_results(write_lines(tmp_path / "runs.jsonl", lines), synthetic=True)
    assert len(frame) + len(left_out) == len(lines) and all(map(str.isprintable, left_out.reason))
    frame.groupby(["pair", "machine", "precision", "commit"]).size(), load_curves(tmp_path / "runs.jsonl", synthetic=True)
    with pytest.warns(UserWarning, match="It does not count"):
        assert 0 < len(whole(lines)) < len(lines)


BOMBS = {  # lines that are short or compress well, and are more than they look like
    "lists": b"[" * 1_000_000, "objects": b'{"a":' * 100_000, "closed lists": b"[" * 900 + b"]" * 900, "deep record": b'{"run_id": ' + b"[" * 300 + b"]" * 300 + b"}",
    "digits": b'{"seed": ' + b"9" * 5000 + b"}", "beyond a float": b'{"recipe": {"lr": 1e400}}', "nan": b'{"seed": NaN}', "bytes": b"\xff\xfe", "null": b"null",
    "longest text": b'"' + b"a" * 20_000_000 + b'"', "blank": b" " * 20_000_000, "lone surrogate": b'{"run_id": "\\udc80"}',
}


@pytest.mark.parametrize("name", [*BOMBS, "sparse"])
def test_lines_that_are_bombs_are_left_out(tmp_path, name, patient):
    file = tmp_path / "runs.jsonl"
    append_record(file, synthetic_record())
    with open(file, "ab") as more:
        more.write(BOMBS.get(name, b""))
        more.truncate(2**34 if name == "sparse" else None)
    with patient(2):
        frame, left_out = load_results(file, synthetic=True)
        with pytest.warns(UserWarning, match="line 2, is not a whole record|does not count"):
            assert len(whole(read_records(file))) == 1
    assert len(frame) == 1 and left_out.line.tolist() == [2]


def test_no_more_bits_are_read_than_a_run_has_images(tmp_path, patient):
    "Of a file of any size, which takes no room on the disk."
    file = tmp_path / "runs.correct" / f"{'0' * 64}.bits"
    file.parent.mkdir()
    with open(file, "wb") as sparse:
        sparse.truncate(2**36)
    with patient(2), pytest.raises(ValueError, match="does not hold the 10000 bits"):
        read_correct(tmp_path / "runs.jsonl", "0" * 64, 10_000)


HOSTILE = r"\input{/etc/passwd}%&#$_^~ | `code` **b** <img src=x onerror=alert(1)> [click](http://x) ![p](http://x) &lt; {x}" + "\n\n# head\x1b"


def test_names_are_text_in_every_form_of_a_table(tmp_path):
    import mistune

    index = pd.MultiIndex.from_tuples([(HOSTILE, "a"), (HOSTILE, HOSTILE)], names=[HOSTILE, "method"])
    for table in (pd.DataFrame({HOSTILE: [HOSTILE, "70.66"], "plain": ["1", "2"]}, index), pd.DataFrame({HOSTILE: [HOSTILE]})):
        html = write_table(table, "names", HOSTILE, [HOSTILE, "1. " + HOSTILE], tmp_path)
        nodes = mistune.create_markdown(renderer="ast", plugins=["table"])((tmp_path / "names.md").read_text())
        assert [node["type"] for node in nodes if node["type"] != "blank_line"] == ["paragraph", "table", "paragraph", "paragraph"]
        kinds = Counter(re.findall(r"'type': '(\w+)'", str(nodes)))
        assert not kinds.keys() & {"link", "image", "inline_html", "block_html", "codespan", "emphasis"} and kinds["strong"] == 1
        assert re.findall(r"</?(\w+)", html.partition("</style>")[2]) and not re.search("<(img|b|h1)|onerror=alert[^&]*>", re.sub("&lt;.*?&gt;", "", html))
        latex = (tmp_path / "names.tex").read_text()
        ours = r"begin|end|centering|caption|label|toprule|midrule|bottomrule|cline|multirow|footnotesize|textbackslash|textasciitilde|textasciicircum"
        assert set(re.findall(r"\\([a-zA-Z]+)", latex)) <= set(ours.split("|")), "no command but ours"
        assert "\x1b" not in latex + html and "\n\n#" not in latex
    for name in ("../names", "a/b", "", "x}", 'a"b', "a\n"):
        with pytest.raises(ValueError, match="a table is called"):
            write_table(table, name, "Names", [], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"names.md", "names.tex"}


def test_curves_are_one_row_an_epoch(tmp_path):
    source = Path(__file__).parents[1] / "results" / "short.jsonl"
    runs, curves = load_results(source)[0], load_curves(source)
    assert len(curves) == runs.epochs.sum() and not curves.duplicated(["run_id", "epoch"]).any()
    last = curves.sort_values("epoch").groupby("run_id").test_top1.last()
    assert last.to_dict() == runs.set_index("run_id").last_top1.to_dict()
    (tmp_path / "none.jsonl").write_text("")
    assert load_curves(tmp_path / "none.jsonl").empty


def test_what_an_experiment_writes_is_valid(tmp_path):
    experiment = prepare_experiment(
        pair="r56_r20",
        methods="ce,kd+sort",
        preset="quick",
        dataset="digits",
        epochs=1,
        train_size=100,
        test_size=50,
        teachers_dir=f"{tmp_path}/teachers",
        results_dir=f"{tmp_path}/results",
    )
    alone, taught = [check_record(json.loads(json.dumps(record))) for record in run_experiment(experiment, progress=False).records]
    with pytest.raises(RecordError, match="about_teacher is None, expected an object, since the method uses a teacher"):
        check_record(taught | {"about_teacher": None})
    frame, left_out = load_results(experiment.records_file)
    assert frame.method.tolist() == ["ce", "kd+sort"] and left_out.empty and len(select(frame)) == 2
    append_record(experiment.records_file, alone | {"about_teacher": taught["about_teacher"]})  # as earlier records say
    assert load_results(experiment.records_file)[1]["reason"].tolist() == [f"the same run as {alone['run_id']}, which finished first"]
    assert frame.changed_share[1] == frame.wrong_share[1] > 0 and frame.not_paper.notna().all()
    assert [100 * correct.sum() / len(correct) for correct in frame.correct] == frame.last_top1.tolist()

    file, = (each for each in experiment.records_file.with_suffix(".correct").glob("*.bits") if each.stem != frame.correct_sha256[1])
    file.write_bytes(zlib.compress(bytes(7)))
    frame, left_out = load_results(experiment.records_file)
    assert frame.method.tolist() == ["kd+sort"] and "does not hold the 50 bits" in left_out.reason[0]
    file.unlink()
    assert load_results(experiment.records_file)[0].correct.map(type).tolist() == [type(None), np.ndarray]


def test_a_run_that_diverges_is_recorded_and_counts(tmp_path):
    parameters = dict(pair="resnet20:resnet8", methods="ce,kd", preset="quick", dataset="digits", epochs=3, train_size=100, test_size=50,
                      recipe="lr=1e30", teachers_dir=f"{tmp_path}/teachers", results_dir=f"{tmp_path}/results")
    with pytest.raises(FloatingPointError, match="loss of (ce|kd) is (nan|inf) in epoch 1.*It is recorded"):
        run_experiment(prepare_experiment(**parameters), progress=False)
    frame, left_out = load_results(tmp_path / "results" / "quick.jsonl")
    assert frame.diverged.tolist() == [True, True] and frame.last_top1.between(0, 40).all() and left_out.empty
    with pytest.raises(FloatingPointError, match="It is recorded"):  # not trained again
        run_experiment(prepare_experiment(**parameters), progress=False)
    assert len(load_results(tmp_path / "results" / "quick.jsonl")[0]) == 2
    record = read_records(tmp_path / "results" / "quick.jsonl")[0]
    with pytest.raises(RecordError, match="the number of epochs in curve"):
        check_record(record | {"diverged": {"epoch": 3, "message": "?"}, "curve": {"epoch": [1]}})


def test_an_accuracy_that_its_images_contradict_is_refused(tmp_path):
    record = synthetic_record("r56_r20", "kd")
    correct = torch.arange(record["data"]["test_images"]) < 100
    record["result"]["correct_sha256"] = save_correct(tmp_path / "runs.jsonl", correct)
    append_record(tmp_path / "runs.jsonl", record)
    frame, left_out = load_results(tmp_path / "runs.jsonl", synthetic=True)
    assert frame.empty and "has 100 of 500" in left_out.reason[0]


# What reaches a table


def pretenders(record):
    "Records that look like `record`, a full run, and are not; each with a word of the reason."
    about = record["about_teacher"]
    short = synthetic_record(record["pair"], record["method"]["name"], epochs=5) | {
        "preset": "paper",
        "full_recipe": True,
    }
    trained = {"epochs": 240, "train_images": 50_000, "data_checksum": CIFAR100_CHECKSUM}
    return {
        "full_recipe": record | {"full_recipe": False},
        "preset": record | {"preset": "quick"},
        "data is": short,
        "train_images": changed(record, "data.train_images", 49_999),
        "test_images": changed(record, "data.test_images", 500),
        "data checksum": changed(record, "data.checksum", "3" * 64),
        "batch_size": changed(record, "recipe.batch_size", 128),
        "lr is": changed(record, "recipe.lr", 0.1),
        "milestones": changed(record, "recipe.milestones", [100, 150, 200]),
        "method settings": changed(record, "method.settings", {"temperature": 2.0}),
        "kd_weight": changed(record, "method.kd_weight", 9.0),
        "teacher had 10 epochs": changed(record, "about_teacher", about | {"training": trained | {"epochs": 10}}),
        "teacher's train_images": changed(
            record, "about_teacher", about | {"training": trained | {"train_images": 400}}
        ),
        "teacher's data_checksum": changed(
            record, "about_teacher", about | {"training": trained | {"data_checksum": "4" * 64}}
        ),
        "nothing is known": changed(record, "about_teacher.file", "mine.pth"),
        "source": changed(record, "about_teacher.source", "given"),
        "weak": changed(record, "about_teacher.top1", 60.0),
    }


def tables_of(path, folder):
    runs = select_paper(load_results(path, synthetic=True)[0])
    columns = [(PAIRS[name].teacher, PAIRS[name].student) for name in ("r56_r20", "vgg13_vgg8")]
    write_table(
        comparison_table(runs, REPORTED[REPORTED.dataset == "cifar100"], columns),
        "comparison",
        "Comparison",
        [],
        folder,
    )
    write_table(paired_effects(runs).astype(str), "effects", "Effects", [], folder)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_nothing_planted_reaches_a_table(tmp_path):
    clean = synthetic_records({"r56_r20": 0.5, "vgg13_vgg8": -0.2}, np.random.default_rng(0), preset="paper")
    first = clean[0]
    better = synthetic_record("r56_r20", "kd", 0, 99.0, preset="paper") | {
        "run_id": "again",
        "finished": "2027-01-01T00-00-00.0Z",
    }
    foreign = [
        each | {"seed": 100 + number, "run_id": f"foreign{number}"}
        for number, each in enumerate(pretenders(first).values())
    ]
    broken = [
        changed(first, "result.last_top1", math.nan) | {"seed": 200},
        changed(first, "finished", None) | {"seed": 201},  # unfinished
        changed(first, "curve.test_top1", first["curve"]["test_top1"][:100]) | {"seed": 202},
        {key: value for key, value in first.items() if key != "synthetic"} | {"seed": 203},
        {"rows": []},
        [1, 2],
        "text",
    ]
    cut = json.dumps(clean[1] | {"seed": 204})[:-40]
    write_lines(tmp_path / "clean" / "paper.jsonl", clean)
    write_lines(
        tmp_path / "dirty" / "a.jsonl",
        [better, *foreign, *broken],
        f"{cut}\n",
        "\udcff\n".encode("utf-8", "surrogateescape").decode("latin-1"),
    )
    write_lines(tmp_path / "dirty" / "paper.jsonl", clean, cut)
    write_lines(tmp_path / "dirty" / "quick.jsonl", [first | {"seed": 300}])

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert tables_of(tmp_path / "clean", tmp_path / "one") == tables_of(tmp_path / "dirty", tmp_path / "two")

    frame, left_out = load_results(tmp_path / "dirty", synthetic=True)
    assert (
        len(frame) == len(clean) + len(foreign)
        and frame[frame.run_id.str.startswith("foreign")].not_paper.notna().all()
    )
    reasons = left_out.reason.str.cat(sep="\n")
    assert len(left_out) == 1 + len(broken) + 3 + 1, reasons
    assert reasons.count("quick runs show how all works and are no evidence") == 1
    assert reasons.count("the same run as synthetic-r56_r20-kd-seed0, which finished first") == 1
    assert (
        reasons.count("is not a whole record") == 3
        and "is real, and not read here" in reasons
        and "finished is 'missing'" in reasons
    )
    assert load_results(tmp_path / "dirty")[0].run_id.tolist() == ["synthetic-r56_r20-kd-seed0"], (
        "only the record without the mark is real"
    )


@pytest.mark.parametrize("reason", list(pretenders(synthetic_record(preset="paper"))))
def test_each_pretender_is_found_for_its_reason(reason, tmp_path):
    record = pretenders(synthetic_record(preset="paper"))[reason]
    frame, _ = load_results(write_lines(tmp_path / "paper.jsonl", [record]), synthetic=True)
    expected = {"source": "nothing is known", "weak": "nothing is known"}.get(reason, reason)
    assert len(frame) == 1 and expected in frame.not_paper[0] and select_paper(frame).empty


def test_a_teacher_trained_in_full_here_serves(tmp_path):
    training = {"epochs": 240, "train_images": 50_000, "data_checksum": CIFAR100_CHECKSUM}
    record = changed(synthetic_record(preset="paper"), "about_teacher.training", training)
    assert len(select_paper(load_results(write_lines(tmp_path / "paper.jsonl", [record]), synthetic=True)[0])) == 1


@pytest.mark.parametrize(
    "path, value, column",
    [
        ("data.checksum", "5" * 64, "data_checksum"),
        ("recipe.batch_size", 32, "recipe"),
        ("recipe.lr", 0.1, "lr"),
        ("preset", "other", "preset"),
        ("about_teacher.weights_sha256", "6" * 64, "teacher_sha256"),
        ("precision", "bfloat16", "precision"),
        ("method.settings", {"beta": 1}, "method_settings"),
        ("data.train_images", 10, "train_images"),
    ],
)
def test_mixed_runs_cannot_be_selected(path, value, column, tmp_path):
    records = [synthetic_record(), changed(synthetic_record(seed=1), path, value)]
    frame, _ = load_results(write_lines(tmp_path / "runs.jsonl", records), synthetic=True)
    with pytest.raises(ValueError, match=f"different values of {column} cannot share a table"):
        select(frame)
    chosen = frame[column].iloc[0]
    assert len(select(frame, **{column: chosen})) == 1


def test_a_folder_without_runs_says_why_and_gives_no_table(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "quick").mkdir()
    write_lines(tmp_path / "quick" / "quick.jsonl", [synthetic_record()])
    os.mkfifo(tmp_path / "quick" / "pipe.jsonl")
    (tmp_path / "quick" / "blank.jsonl").write_text("\n\n")
    frame, left_out = load_results(tmp_path / "quick")
    assert frame.empty and dict(zip(left_out.file, left_out.reason)).keys() == {"quick.jsonl", "pipe.jsonl", "blank.jsonl"}
    assert left_out.reason.str.contains("no evidence|is not a file|holds no record").all() and (left_out.line == 0).all()
    frame, left_out = load_results(tmp_path / "empty")
    assert left_out[["file", "reason"]].values.tolist() == [["empty", "the folder holds no file of records (.jsonl)"]]
    assert frame.empty and select_paper(frame).empty and select(frame, preset="short").empty
    effects = paired_effects(select_paper(frame))
    assert effects.empty and pool_effects(effects).empty and seeds_needed(effects).empty
    for nothing in (effect_table(verdicts(effects)), frame.astype(str), pd.DataFrame(index=["a row"])):
        with pytest.raises(ValueError, match="the table nothing has no rows"):
            write_table(nothing, "nothing", "Nothing", [], tmp_path)
    assert not list(tmp_path.glob("nothing.*"))
    table = comparison_table(select_paper(frame), REPORTED, [("resnet56", "resnet20")])
    assert set(table.index.get_level_values(1)) == {"reported, best"}, "what is not measured has no row"
    for absent in (tmp_path / "absent.jsonl", tmp_path / "quick" / "pipe.jsonl"):
        with pytest.raises(FileNotFoundError, match="there is no file of records"):
            load_results(absent)


def test_a_frame_says_what_its_record_says(tmp_path):
    record = synthetic_record("vgg13_vgg8", "dkd+sort", 4, 71.0, best_above_last=0.5, epochs=8)
    record["result"] |= {"seconds": 12.0, "teacher_wrong_rows": 2000, "changed_rows": 1000}  # of 8,000
    row = load_results(write_lines(tmp_path / "one.jsonl", [record]), synthetic=True)[0].iloc[0]
    expected = {"pair": "vgg13_vgg8", "teacher": "vgg13", "student": "vgg8", "method": "dkd+sort", "objective": "dkd", "repair": "sort",
                "seed": 4, "last_top1": 71.0, "best_top1": 71.5, "best_epoch": 7, "seconds": 12.0, "wrong_share": 0.25,
                "changed_share": 0.125, "epochs": 8, "train_images": 1000, "test_images": 500, "precision": "float32"}
    assert {name: row[name] for name in expected} == expected


def test_a_table_holds_means_spreads_and_differences():
    runs = {"teacher": "vgg13", "student": "vgg8", "method": ["kd", "kd", "kd+sort"], "last_top1": [70.0, 71.0, 72.0],
            "best_top1": [70.5, 72.5, 73.0], "precision": ["float32", "float32", "bfloat16"]}
    reported = {"teacher": "vgg13", "student": "vgg8", "method": ["kd", "dkd"], "top1": [72.98, 74.68], "top1_last": [math.nan, 74.1]}
    table = comparison_table(pd.DataFrame(runs), pd.DataFrame(reported), [("vgg13", "vgg8")], methods=("kd", "dkd"))
    assert table["vgg13 → vgg8"].to_dict() == {
        ("KD", "reported, best"): "72.98",
        ("KD", "ours, last"): "70.50 ± 0.71 (2)",
        ("KD", "ours, best"): "71.50 ± 1.41 (2)",
        ("KD", "difference, best"): "−1.48",
        ("DKD", "reported, best"): "74.68 (last 74.10)",
        ("KD + sort", "ours, last"): "72.00 (1, bfloat16)",
        ("KD + sort", "ours, best"): "73.00 (1, bfloat16)",
    }


def test_a_summary_holds_means_and_spreads():
    records = [synthetic_record(method="kd+sort", seed=seed, last_top1=top1, best_above_last=2 * seed + 1) for seed, top1 in ((0, 70), (1, 72))]
    assert summarize(records).to_dict("index") == {"kd+sort": {
        "seeds": 2, "top-1 last (%)": "71.00 ± 1.41", "top-1 best (%)": "73.00 ± 2.83", "time (s)": "3600", "teacher wrong": "10.0%",
        "changed": "10.0%"}}
    assert len(summarize([synthetic_record(method=name, preset="paper") for name in ("kd", "mlkd")])) == 2, "each at its published length"


# Statistics


def outcomes(effect, sets, seeds, deviation, seed):
    generator = np.random.default_rng(seed)
    frames = [
        pd.DataFrame(
            {
                "pair": np.repeat(np.arange(sets), seeds),
                "teacher": "resnet56", "student": "resnet20", "objective": "kd",
                "repair": repair,
                "seed": np.tile(np.arange(seeds), sets),
                "last_top1": (70 + gain + generator.normal(0, deviation, (sets, seeds))).ravel(),
            }
        )
        for repair, gain in (("none", 0.0), ("sort", np.reshape(effect, (-1, 1))))
    ]
    return pd.concat(frames)


def within_binomial_error(share, expected, count, sigmas=4):
    return abs(share - expected) < sigmas * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("effect", [-0.4, 0.0, 1.0])
@pytest.mark.parametrize("seeds", [2, 5])
def test_intervals_cover_the_planted_effect_as_often_as_they_claim(effect, seeds):
    effects = paired_effects(outcomes(effect, 400, seeds, 0.3, seed=seeds))
    assert within_binomial_error(((effects.low <= effect) & (effect <= effects.high)).mean(), 0.95, 400)
    fewer = paired_effects(outcomes(effect, 400, seeds, 0.3, seed=seeds), level=0.5)
    assert within_binomial_error(((fewer.low <= effect) & (effect <= fewer.high)).mean(), 0.5, 400)


def test_intervals_cover_through_files(tmp_path):
    planted = {f"set{number}": 0.3 for number in range(150)}
    path = write_lines(
        tmp_path / "planted.jsonl", synthetic_records(planted, np.random.default_rng(7), objectives=("kd",))
    )
    effects = paired_effects(select(load_results(path, synthetic=True)[0]))
    assert len(effects) == 150 and (effects.seeds == 5).all()
    assert within_binomial_error(((effects.low <= 0.3) & (0.3 <= effects.high)).mean(), 0.95, 150)


@pytest.mark.parametrize("case", ["equal", "unequal", "noisy", "shared"])
def test_pooled_intervals_cover(case):
    teachers, error, of_teacher = {
        "equal": (range(6), [0.16] * 6, 0.0), "unequal": (range(6), [0.09, 0.4] * 3, 0.2), "noisy": (range(6), [0.2, 0.18] * 3, 0.0),
        "shared": ([0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5], [0.16] * 12, 0.3),
    }[case]
    generator, hits, repetitions = np.random.default_rng(11), 0, 500
    for _ in range(repetitions):
        means = 0.25 + generator.normal(0, of_teacher, 6)[list(teachers)] + generator.normal(0, error)
        row = pool_effects(pd.DataFrame({"objective": "kd", "teacher": list(teachers), "mean": means})).iloc[0]
        hits += row.low <= 0.25 <= row.high
    assert within_binomial_error(hits / repetitions, 0.95, repetitions) and row.teachers == 6


def test_two_teachers_are_uninformative():
    row = pool_effects(pd.DataFrame({"objective": "kd", "teacher": ["a", "a", "b"], "mean": [0.0, 0.2, 0.3]})).iloc[0]
    assert (row.pairs, row["mean"], row.note) == (3, pytest.approx(0.2), "uninformative: 2 teachers") and math.isnan(row.low)


def test_only_shared_seeds_are_compared():
    frame = outcomes(0.3, 1, 4, 0.2, seed=0)
    frame = frame[~((frame.repair == "sort") & (frame.seed == 1)) & ~((frame.repair == "none") & (frame.seed == 3))]
    (row,) = paired_effects(frame).itertuples()
    values = frame.set_index(["repair", "seed"]).last_top1
    assert row.seeds == row.unmatched == 2 and row.differences == (
        values["sort", 0] - values["none", 0],
        values["sort", 2] - values["none", 2],
    )


def test_one_seed_has_a_mean_and_no_interval():
    (row,) = verdicts(paired_effects(outcomes(0.3, 1, 1, 0.2, seed=0))).to_dict("records")
    assert row["p_flip"] == 1 and math.isnan(row["p"]) and math.isnan(row["low"]) and math.isfinite(row["mean"])
    assert row["verdict"] == "inconclusive"


@pytest.mark.parametrize("seeds", [2, 3, 5, 6, 9])
def test_the_sign_flip_test_is_the_full_enumeration(seeds):
    effects = paired_effects(outcomes(0.1, 20, seeds, 0.3, seed=seeds))
    for row in effects.itertuples():
        flipped = [
            abs(np.mean(np.multiply(row.differences, signs))) for signs in itertools.product((1, -1), repeat=seeds)
        ]
        assert row.p_flip == pytest.approx(np.mean([value >= abs(row.mean) - 1e-12 for value in flipped])) and row.p_flip >= 2 / 2**seeds


def test_the_sign_flip_test_of_many_seeds():
    assert sign_flip_test([0.3]) == sign_flip_test([0.0, 0.0]) == 1
    for seeds in (5, 17):
        assert sign_flip_test([0.1] * seeds) == pytest.approx(2 / 2**seeds)
        assert sign_flip_test([0.1] * (seeds - 1) + [-0.1]) == pytest.approx(2 * (1 + seeds) / 2**seeds)  # ties are counted
    assert sign_flip_test([0.1] * 60) < 1e-4
    differences = np.random.default_rng(0).normal(0.1, 0.6, 60)
    assert sign_flip_test(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)


@pytest.mark.parametrize("ratio, number", [(6.25, 2), (6.25, 3), (2.0, 4), (0.5, 34), (12.0, 2), (0.1, 30)])
def test_the_power_is_that_of_a_simulation(ratio, number):
    samples = np.random.default_rng(8).normal(ratio, 1, (20_000, number))
    statistic = samples.mean(1) / samples.std(1, ddof=1) * math.sqrt(number)
    found = (abs(statistic) > stats.t.ppf(0.975, number - 1)).mean()
    assert within_binomial_error(found, t_test_power(ratio, number), 20_000)


def test_every_number_of_seeds_reaches_the_power_and_one_less_does_not():
    for ratio in np.arange(0.1, 12, 0.03):
        number = smallest_number(partial(t_test_power, ratio))
        assert t_test_power(ratio, number) >= 0.8 and (number == 2 or t_test_power(ratio, number - 1) < 0.8)
    assert smallest_number(partial(t_test_power, 1 / 0.16)) == 3 and smallest_number(partial(t_test_power, 0.0)) == math.inf
    assert smallest_number(partial(t_test_power, 1e6)) == 2


def test_numbers_of_seeds_agree_with_statsmodels():
    from statsmodels.stats.power import TTestPower

    effects = paired_effects(outcomes(0.3, 8, 5, 0.25, seed=3))
    deviation = seed_deviation(effects)
    assert deviation["degrees_of_freedom"] == 32 and deviation["low"] < deviation["std"] < deviation["high"]
    squares = np.concatenate([np.subtract(each, np.mean(each)) ** 2 for each in effects.differences])
    assert deviation["std"] == pytest.approx(math.sqrt(squares.sum() / 32))
    for gain, row in zip((0.1, 0.2, 0.4), seeds_needed(effects, gains=(0.1, 0.2, 0.4)).itertuples()):
        solved = TTestPower().solve_power(gain / deviation["std"], power=0.8, alpha=0.05, alternative="two-sided")
        assert row.seeds == math.ceil(solved) and row.seeds_low <= row.seeds <= row.seeds_high and f"{gain:g}" in row.to_find


def test_each_objective_needs_its_own_number_of_seeds():
    effects = pd.concat([paired_effects(outcomes(0.3, 8, 5, deviation, seed=3)).assign(objective=name) for name, deviation in (("kd", 0.2), ("dkd", 0.4))])
    kd, dkd = (group.set_index("to_find").seeds for _, group in seeds_needed(effects).groupby("objective", sort=False))
    assert (kd["a gain of 0.5"] < dkd["a gain of 0.5"]) and kd["equivalence within ±0.5"] < dkd["equivalence within ±0.5"]


@pytest.mark.parametrize("effect, std, seeds", [(0.0, 0.45, 15), (0.5, 0.45, 15), (0.4, 0.2, 6), (1.0, 0.5, 5), (-0.8, 0.45, 15), (0.0, 1.5, 3)])
def test_the_probabilities_of_verdicts_are_those_of_a_simulation(effect, std, seeds):
    values = np.random.default_rng(9).normal(effect, std, (4000, seeds))
    mean, deviation = values.mean(1), values.std(1, ddof=1)
    p = 2 * stats.t.sf(abs(mean) * math.sqrt(seeds) / deviation, seeds - 1)
    found = verdicts(pd.DataFrame({"seeds": seeds, "mean": mean, "std": deviation, "p": p})).verdict
    expected = verdict_probabilities(effect, std, seeds)
    assert sum(expected.values()) == pytest.approx(1)
    for name, probability in expected.items():
        assert abs((found == name).mean() - probability) < 4 * math.sqrt(max(probability * (1 - probability), 1e-4) / 4000)


def test_wrong_verdicts_are_as_rare_as_the_level_says():
    for std in (0.1, 0.45, 2.0):
        for seeds in (2, 5, 15):
            nothing, edge = verdict_probabilities(0.0, std, seeds), verdict_probabilities(0.5, std, seeds)
            assert nothing["gain"] <= 0.025 + 1e-6 and nothing["loss"] <= 0.025 + 1e-6 and edge["equivalent"] <= 0.05 + 1e-6


def test_verdicts_are_those_of_two_one_sided_tests_and_corrected_by_holm():
    from statsmodels.stats.weightstats import DescrStatsW

    effects = verdicts(paired_effects(outcomes(0.3, 12, 6, 0.3, seed=2)))
    for row in effects.itertuples():
        p, _, _ = DescrStatsW(np.array(row.differences)).ttost_mean(-0.5, 0.5)
        assert row.p_equivalent == pytest.approx(p) and (row.verdict == "equivalent") == (p <= 0.05)
        assert row.p <= row.p_holm <= min(1, 12 * row.p)
    # Together: the k-th smallest of m values is compared with level / (m - k + 1), up to the first that is too large.
    for gain in (0.3, 0.6):
        effects = verdicts(paired_effects(outcomes(gain, 12, 6, 0.3, seed=2)), together=True)

        def passes(values):
            order = np.argsort(values)
            first_failure = next((k for k, row in enumerate(order) if values[row] > 0.05 / (len(values) - k)), len(values))
            return {int(row) for row in order[:first_failure]}

        equivalent, different = passes(effects.p_equivalent.to_numpy()), passes(effects.p.to_numpy())
        assert {*np.flatnonzero(effects.verdict == "equivalent")} == equivalent
        assert {*np.flatnonzero(effects.verdict == "gain")} == different - equivalent and (different or equivalent)
    assert verdicts(effects.iloc[:1]).verdict.tolist() == verdicts(effects.iloc[:1], together=True).verdict.tolist()


def test_comparisons_are_titled_as_papers_write_them():
    assert [comparison_title(each) for each in ("kd+sort minus kd", "kd+sort minus kd+loca", "normkd+sort minus normkd")] == [
        "KD + sort − KD", "KD + sort − (KD + LoCa)", "NormKD + sort − NormKD"]


def test_a_confidence_sequence_inverts_its_bayes_factor():
    values = np.random.default_rng(3).normal(0.3, 0.4, 12)
    row = confidence_sequence(values).iloc[-1]
    statistic = (values.mean() - row.low) / (values.std(ddof=1) / math.sqrt(12))  # at an end the Bayes factor is 20
    factor = ((1 + statistic**2 / 11) / (1 + statistic**2 / (11 * 13))) ** 6 / math.sqrt(13)
    assert factor == pytest.approx(20)


def test_the_interval_over_seeds_and_images_is_that_of_two_random_effects():
    generator = np.random.default_rng(4)
    plain = generator.random((40, 500)) < generator.normal(0.6, 0.05, (40, 1))
    repaired = generator.random((40, 500)) < generator.normal(0.65, 0.05, (40, 1))
    of_seeds = stats.ttest_1samp(100 * (repaired.mean(1) - plain.mean(1)), 0).confidence_interval()
    assert crossed_interval(plain, repaired) == pytest.approx(of_seeds, abs=0.05), "images of one kind add nothing"
    assert crossed_interval(plain, plain) == (0, 0)
    helped = np.arange(500) < 100  # an effect that other images would not show is as unsure as the images are few
    low, high = crossed_interval(np.zeros((40, 500), bool), np.tile(helped, (40, 1)))
    assert (low, high) == pytest.approx(stats.ttest_1samp(100.0 * helped, 0).confidence_interval(), rel=1e-6)


def test_the_deviation_interval_covers():
    effects = paired_effects(outcomes(0.0, 600, 5, 0.3, seed=5))
    true = 0.3 * math.sqrt(2)
    inside = [
        deviation["low"] <= true <= deviation["high"]
        for deviation in (seed_deviation(effects.iloc[[number]]) for number in range(600))
    ]
    assert within_binomial_error(np.mean(inside), 0.95, 600)


# What was reported


def test_reported_numbers_have_sources_and_the_slip_is_corrected():
    assert len(REPORTED) == 114 and REPORTED[["source", "paper"]].notna().all().all()
    assert not REPORTED.duplicated(["dataset", "method", "teacher", "student"]).any()
    row = REPORTED.set_index(["dataset", "method", "teacher", "student"]).top1
    assert (
        row["cifar100", "kd", "resnet32x4", "ShuffleV2"] == 74.45
        and row["cifar100", "dkd", "resnet32x4", "ShuffleV2"] == 77.07
    )
    assert ("cifar100", "kd", "resnet32x4", "MobileNetV2") not in row.index
    assert row["cifar100", "wttm", "resnet56", "resnet20"] == 71.92 and row["cifar100", "wttm", "resnet32x4", "resnet8x4"] == 76.06
    for method, numbers in {"dist": (72.07, 73.24), "wttm": (72.19, 73.09), "kd": (71.03, 70.5)}.items():
        assert numbers == (row["imagenet", method, "ResNet34", "ResNet18"], row["imagenet", method, "ResNet50", "MobileNetV1"])
    of_mdistiller = REPORTED[REPORTED.method.isin(["kd", "dkd"])]
    assert set(of_mdistiller.arxiv) == {"2203.08679"} and of_mdistiller.source.str.contains("mdistiller").all()
    logs = REPORTED.dropna(subset="top1_last")
    assert (logs.top1 >= logs.top1_last).all() and set(logs.arxiv) == {"2403.01427"}
    known = Counter(
        REPORTED[REPORTED.method.isin(["kd", "dkd"]) & (REPORTED.dataset == "cifar100")]
        .set_index(["teacher", "student"])
        .index
    )
    pairs = {(pair.teacher, pair.student) for name, pair in PAIRS.items() if name != "r32x4_mv2"}
    assert set(known) == pairs and set(known.values()) == {2}


# The notebooks


def run_notebook(name, folder, **parameters):
    import papermill

    parameters = {
        "results_dir": str(folder / "results"),
        "output_dir": str(folder / name),
        "synthetic": True,
        **parameters,
    }
    notebook = papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb", parameters, progress_bar=False, cwd=NOTEBOOKS.parent
    )
    text = "".join(
        str(output.get("text", "")) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    return text, {path.name: path.read_bytes() for path in sorted((folder / name).iterdir())}


@pytest.fixture(scope="module")
def synthetic_folder(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("evidence"), np.random.default_rng(1)
    write_lines(
        folder / "results" / "short.jsonl",
        synthetic_records({"r56_r20": 0.3}, generator, preset="short", epochs=6, seeds=3),
    )
    paper = synthetic_records({"r56_r20": 0.3, "r32x4_shuv2": 0.1}, generator, preset="paper", seeds=3)
    write_lines(folder / "results" / "paper.jsonl", paper, json.dumps(paper[0])[:300])
    rows = [
        {"what": "sorting", "setting": "(64, 100)", "ms": {"two full sorts": [3.0, 2.9, 3.2], "sort_logits": [1.0, 0.9, 1.1]}},
        {"what": "epoch", "setting": "resnet56 to resnet20, batch 64", "ms": {"usual, float32": [9.0, 8.0, 9.5], "ours, float32": [3.0, 2.0, 4.0]}},
    ]
    machines = [{"processor": "a processor"}, {"processor": "a processor", "gpu": "a GPU"}]
    write_lines(
        folder / "results" / "measurements" / "benchmarks.jsonl",
        [{"benchmark": "speed", "protocol": 2, "machine": machine, "rows": rows} for machine in machines]
        + [{"benchmark": "accuracy"}],
    )
    return folder


def test_tables_are_made_from_records(synthetic_folder):
    text, first = run_notebook("paper_tables", synthetic_folder)
    assert "24 of the published recipe, 12 short ones, 0 others; 1 lines left out" in text
    assert "no table, since it has no row" in text
    assert {Path(name).stem for name in first} == {  # no planned effect can be shown
        "plans",
        "dose",
        "same_architecture",
        "different_architecture",
        "imagenet",
        "sorting_effect",
        "short_runs",
        "short_effect",
        "power",
        "grid",
        "left_out",
    }
    assert {Path(name).suffix for name in first} == {".md", ".tex"}
    assert all("SYNTHETIC RECORDS" in content.decode() for content in first.values())
    different = first["different_architecture.md"].decode()
    assert "the heading is a slip" in different and "12 of the 120 runs" in different


@pytest.mark.slow
def test_tables_regenerate_to_the_byte(synthetic_folder):
    first = run_notebook("paper_tables", synthetic_folder)[1]
    assert run_notebook("paper_tables", synthetic_folder)[1] == first


@pytest.mark.slow
def test_figures_regenerate_to_the_pixel_and_none_is_lost(synthetic_folder, monkeypatch):
    monkeypatch.setenv("SORTKD_DATA", str(synthetic_folder / "no data"))
    kept = synthetic_folder / "paper_figures" / "mistakes.png"
    kept.parent.mkdir()
    kept.write_bytes(b"as committed")
    text, first = run_notebook("paper_figures", synthetic_folder)
    assert "mistakes is left as it is: it needs CIFAR-100" in text and "features is not drawn" in text
    assert first["mistakes.png"] == b"as committed"
    drawn = {
        "diagram",
        "curves_short",
        "curves_r56_r20",
        "curves_r32x4_shuv2",
        "effect",
        "effect_short",
        "repairs",
        "speed",
    }
    assert set(first) == {f"{name}.{suffix}" for name in drawn for suffix in ("png", "pdf", "md")} | {"mistakes.png"}
    assert all(
        b"CreationDate" not in content and b"/Subtype /Type3" not in content
        for name, content in first.items()
        if name.endswith("pdf")
    )
    assert run_notebook("paper_figures", synthetic_folder)[1] == first


@pytest.mark.slow
def test_notebooks_run_where_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("SORTKD_DATA", str(tmp_path / "no data"))
    (tmp_path / "results").mkdir()
    text, tables = run_notebook("paper_tables", tmp_path, synthetic=False)
    assert "0 runs in" in text and "No short runs are recorded yet." in text and "the folder holds no file of records" in tables["left_out.md"].decode()
    assert "short_runs.md" not in tables and all(content.decode().count("\n| ") > 2 for name, content in tables.items() if name.endswith("md"))
    text, figures = run_notebook("paper_figures", tmp_path, synthetic=False)
    assert "answer is not drawn" in text and {Path(name).stem for name in figures} == {"diagram", "repairs"}
