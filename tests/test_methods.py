"Methods: objectives composed with repairs, the goldens of two views, the papers' numbers."
import json
import math
import re
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY_METHOD
from special_logits import CASES, INFINITE, NO_LIMIT, outcome
from test_losses import (GOLDENS, SORTED, STRONG_STUDENT, STRONG_TEACHER, STUDENT, SUMS_OVER_ROWS,
                         TARGET, TEACHER, cases)

from sortkd.experiment.pairs import IMAGENET_PAIRS, PAIRS, method_for
from sortkd.experiment.setup import prepare_experiment
from sortkd.losses import dkd_loss, kd_loss
from sortkd.methods import (OBJECTIVES, REPAIRS, LearnedTemperature, create_method,
                            curriculum_factor, list_methods, numbers_of, range_of, try_out)
from sortkd.repairs import revise_logits, skip_logits, smooth_logits
from sortkd.sorting import swap_logits


def loss_of(name, student=STUDENT, strong_student=STRONG_STUDENT, epoch=1, rows=slice(None),
            teachers=(TEACHER, STRONG_TEACHER), target=TARGET, learned=None, **changes):
    "The loss of a method, with the strong views and the learned temperature that it asks for."
    method, target = create_method(name, **changes), target[rows]
    repaired, strong_repaired = (method.repair_logits(each[rows], target) for each in teachers)
    strong = (strong_student[rows], strong_repaired) if method.strong_views else None
    return method.loss(student[rows], repaired if method.uses_teacher else None, target, epoch,
                       strong, learned or method.create_temperature())


def two_view_cases():
    "The name of each golden of two views, a method and its changes, and the epoch."
    for repair, end in (("", ""), ("_sort", "+sort")):
        same = {"kd_weight": 0.9, "temperature": 4.0}
        yield f"mlkd_lskd{repair}_ce0.1_kd0.9_T4", f"lskd_mlkd{end}", same, 1
        for T in (2, 3, 4, 6):
            for golden, name, weight in (("mlkd", "mlkd", 0.9), ("mlkd_lskd", "lskd_mlkd", 9)):
                changes = {"temperature": float(T)}
                yield f"{golden}{repair}_ce0.1_kd{weight}_T{T}", f"{name}{end}", changes, 1
        for T, sure, sure_of_strong in ((4, 0.9, 0.2), (1, 0.3, 0.1)):
            changes = {"ce_weight": 0.0, "temperature": float(T), "confidence": sure,
                       "strong_confidence": sure_of_strong}
            golden = f"crld_wv2_cv0.5_T{T}_w{sure}_s{sure_of_strong}"
            yield f"sort_{golden}" if repair else golden, f"crld{end}", changes, 1
    for epoch in (10, 200):  # made with weights 1
        yield f"sld_epoch{epoch}", "sld", {"ce_weight": 1.0, "kd_weight": 1.0}, epoch


@pytest.mark.parametrize("golden,name,changes,epoch", list(two_view_cases()))
def test_golden_of_two_views(golden, name, changes, epoch):
    views = STUDENT.clone().requires_grad_(), STRONG_STUDENT.clone().requires_grad_()
    loss = loss_of(name, *views, epoch, **changes)
    gradients = torch.autograd.grad(loss, views)
    assert abs(loss - GOLDENS[golden]) / GOLDENS[golden] < 2e-6
    for gradient, key in zip(gradients, (f"{golden}_grad", f"{golden}_grad_strong")):
        if key in GOLDENS:
            assert (gradient - GOLDENS[key]).norm() / GOLDENS[key].norm() < 2e-6


def test_every_golden_is_compared():
    of_two_views = {each[0] for each in two_view_cases()}
    names = {name for name, _ in cases()} | of_two_views
    names |= {"sort", "swap", "standardize", "ctkd_raw1_start1_end20"}
    inputs = {"zs", "zt", "zs_strong", "zt_strong", "y", "ctkd_grad", "ctkd_raw_grad_lambda-0.5",
              "wkd_prototypes"}
    gradients = {f"{name}_grad{view}" for name in names for view in ("", "_strong")}
    assert {f"{name}_grad_strong" for name in of_two_views if name[0] == "m"} <= set(GOLDENS)
    assert not set(GOLDENS) - names - inputs - gradients


def test_sld_lets_the_student_teach_only_after_epoch_150():
    def at(epoch, name="sld", **changes):
        return loss_of(name, epoch=epoch, **changes)

    assert at(150) == at(1) < at(151) == at(240)
    assert at(11, student_teaches_after=10) == at(240) and at(240, "sld+sort") != at(240)
    swapped = [swap_logits(teacher, TARGET) for teacher in (TEACHER, STRONG_TEACHER)]
    torch.testing.assert_close(at(1), loss_of("sld+none", teachers=swapped))


@pytest.mark.parametrize(("name", "words"), [
    ("mlkd", "strong"), ("sld+sort", "strong"), ("ctkd", "create_temperature")])
def test_what_a_method_asks_for_is_not_forgotten(name, words):
    method = create_method(name)
    assert method.strong_views == (words == "strong") == (method.create_temperature() is None)
    with pytest.raises(ValueError, match=words):
        method.loss(STUDENT, TEACHER, TARGET, 1)


def test_a_schedule_tells_the_epochs_whose_losses_differ():
    ramp, curriculum = [*range(2, 21)], [*range(2, 11)]
    expected = {"dkd": ramp, "rld": ramp, "lskd_dkd": ramp, "luminet": ramp, "ikl": ramp,
                "ctkd": curriculum, "ctkd_dkd": curriculum, "sld": [151]}
    for name in OBJECTIVES:
        schedules = [create_method(name).schedule(epoch) for epoch in range(1, 241)]
        changes = [epoch for epoch in range(2, 241) if schedules[epoch - 1] != schedules[epoch - 2]]
        assert changes == expected.get(name, []), name


def test_learned_temperature():
    half, whole = LearnedTemperature(2.0, 10.0), LearnedTemperature(2.0, 10.0)
    loss_of("ctkd", learned=half, epoch=5).backward()
    loss_of("ctkd", learned=whole, epoch=10).backward()
    assert half().item() == pytest.approx(2 + 10 / (1 + math.exp(-1)))
    assert half.raw.grad == whole.raw.grad / 2 != 0
    student = STUDENT.clone().requires_grad_()
    kd_loss(student, TEACHER, LearnedTemperature()()).squeeze().backward()
    torch.testing.assert_close(student.grad, GOLDENS["ctkd_grad"], rtol=1e-4, atol=1e-6)
    factors = [curriculum_factor(epoch) for epoch in range(1, 241)]
    assert factors == sorted(factors, reverse=True) and factors[9:] == [-1.0] * 231


PAPERS = {  # weights of cross-entropy and term, warm-up, settings
    "kd": (0.1, 0.9, 0, {"temperature": 4.0}),
    "dkd": (1, 1, 20, {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}),
    "rld": (1, 1, 20, {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "target_temperature": 1.0}),
    "nkd": (1, 1, 0, {"gamma": 3.5, "temperature": 3.0}),
    "ttm": (1, 45, 0, {"exponent": 0.1}), "wttm": (1, 4, 0, {"exponent": 0.2}),
    "normkd": (0.1, 0.9, 0, {"scale": 2.0}), "wsld": (1, 2.25, 0, {"temperature": 4.0}),
    "lskd": (0.1, 9, 0, {"temperature": 2.0}), "pld": (0, 1, 0, {"temperature": 4.0}),
    "lskd_dkd": (1, 9, 20, {"alpha": 1.0, "beta": 8.0, "temperature": 2.0}),
    "ctkd": (0.1, 0.9, 0, {"start": 1.0, "end": 20.0, "curriculum_epochs": 10}),
    "ctkd_dkd": (1, 1, 0, {"alpha": 1.0, "beta": 2.0, "start": 1.0, "end": 20.0,
                           "curriculum_epochs": 10}),
    "mlkd": (0.1, 0.9, 0, {"temperature": 4.0}), "lskd_mlkd": (0.1, 9, 0, {"temperature": 2.0}),
    "sld": (0.1, 0.9, 0, {"student_teaches_after": 150}), "ce": (1, 0, 0, {}),
    "dist": (1, 1, 0, {"inter_weight": 2.0, "intra_weight": 2.0, "temperature": 4.0}),
    "rc": (1, 1, 0, {"temperature": 4.0, "rc_weight": 0.1}),
    "revision": (0, 1, 0, {"logit_weight": 4.0, "prob_weight": 1.0, "eta": 0.8}),
    "ldrld": (1, 1, 0, {"alpha": 10.5, "beta": 7.0, "k": 7, "temperature": 4.0}),
    "luminet": (2, 1, 20, {"alpha": 33.0, "temperature": 4.0}),
    "ikl": (1, 1, 20, {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "weight_temperature": 100.0}),
    "crld": (1, 1, 0, {"temperature": 4.0, "confidence": 0.9, "strong_confidence": 0.2,
                       "within_weight": 2.0, "across_weight": 0.5}),
    "abkd": (1, 1, 0, {"alpha": 0.8, "beta": 0.3, "temperature": 1.0})}


def test_the_numbers_of_the_papers():
    "The weights, lengths and milestones of the public code; a pair's beta belongs to DKD alone."
    for name, entry in OBJECTIVES.items():
        numbers = entry.ce_weight, entry.kd_weight, entry.warmup_epochs, entry.settings
        assert numbers == PAPERS[name] and list(entry.settings) == list(PAPERS[name][-1]), name
        assert entry.pair_beta == (name in ("dkd", "lskd_dkd"))
        length = ((150, 180, 210), 480) if "mlkd" in name else (None, 240)
        assert (entry.milestones, entry.epochs) == length
    for name, beta in (("in_r34_r18", 0.5), ("in_r50_mv1", 2.0)):
        names = "rld", "nkd", "normkd", "wsld"
        methods = [method_for(each, IMAGENET_PAIRS[name]) for each in names]
        assert [(each.ce_weight, each.kd_weight, each.warmup_epochs) for each in methods] == [
            (1, 1, 1), (1, 1, 0), (0.5, 0.5, 0), (1, 2.5, 0)]
        assert [each.settings for each in methods] == [
            {"alpha": 1, "beta": beta, "temperature": 1, "target_temperature": 1},
            {"gamma": 1.5, "temperature": 1}, {"scale": 1}, {"temperature": 2}]


@pytest.mark.parametrize("objective", SUMS_OVER_ROWS)
def test_skip_leaves_out_the_wrong_rows(objective):
    teacher, target = torch.cat([TEACHER, SORTED]), torch.cat([TARGET, TARGET])  # wrong, then right
    students, right = torch.cat([STUDENT, STUDENT]), teacher.argmax(1) == target

    def term(repair, rows):
        student = students[rows].clone().requires_grad_()
        loss = loss_of(f"{objective}+{repair}", student, student, target=target[rows],
                       teachers=(teacher[rows], teacher[rows]), ce_weight=0.0, warmup_epochs=0)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    (loss, gradient), (expected, expected_gradient) = term("skip", slice(None)), term("none", right)
    share = right.float().mean()
    torch.testing.assert_close(loss, expected * share)
    torch.testing.assert_close(gradient[right], expected_gradient * share)
    nothing, no_gradient = term("skip", ~right)
    assert nothing == 0 and not no_gradient.any() and not gradient[~right].any()


def test_list_of_methods():
    names = list_methods()
    relating = sum(each.relates_rows for each in OBJECTIVES.values())  # which skip does not suit
    assert len(names) == len(set(names)) == 1 + (len(OBJECTIVES) - 1) * len(REPAIRS) - relating
    assert {"ce", "kd", "dkd+sort", "lskd+skip", "sld", "sld+none", "mlkd+sort"} < set(names)
    for name in names:
        method = create_method(name)
        assert json.loads(json.dumps(asdict(method))) == asdict(method) and method.name == name
        assert method.standardize is OBJECTIVES[method.objective].standardize
    for name, same in (("kd+none", "kd"), ("sld+swap", "sld"), ("ce+none", "ce")):
        assert create_method(name) == create_method(same)


@pytest.mark.parametrize(("written", "name", "settings", "of_repair"), [
    ("kd(temperature=2)+sort", "kd(temperature=2)+sort", {"temperature": 2.0}, {}),
    ("kd(temperature=2)+none", "kd(temperature=2)", {"temperature": 2.0}, {}),
    (" dkd( beta = 2.0, alpha=1.5 ) + revise(eta=0.9)", "dkd(alpha=1.5,beta=2)+revise(eta=0.9)",
     {"alpha": 1.5, "beta": 2.0, "temperature": 4.0}, {"eta": 0.9}),
    ("sld(student_teaches_after=3)+swap", "sld(student_teaches_after=3)",
     {"student_teaches_after": 3}, {})])
def test_numbers_of_one_s_own(written, name, settings, of_repair):
    "One spelling for each method, which names it again; numbers in the name count more."
    method = create_method(written)
    assert (method.name, method.settings, method.repair_settings) == (name, settings, of_repair)
    assert create_method(method.name) == method
    assert create_method(written, **{next(iter(settings)): 9}).settings == settings
    assert ("repair_settings" in method.as_record()) == bool(of_repair)


@pytest.mark.parametrize(("objective", "temperature"), [
    ("kd", 4.0), ("kd(temperature=2)", 2.0), ("rld", 4.0), ("nkd", 3.0), ("ttm", 10.0),
    ("lskd", 2.0), ("wttm(exponent=0.25)", 4.0), ("mlkd", 4.0), ("ctkd", 1.0), ("sld", 1.0),
    ("normkd", 1.0)])
def test_repairs_mix_at_the_objectives_temperature(objective, temperature):
    "LoCa, MFT and smoothing do; label revision mixes at 1; a number of one's own counts more."
    def assert_repaired(repair, expected):
        method = create_method(f"{objective}+{repair}")
        assert torch.equal(method.repair_logits(TEACHER, TARGET), expected)

    assert_repaired("loca", revise_logits(TEACHER, TARGET, 0.95, temperature))
    assert_repaired("mft", revise_logits(TEACHER, TARGET, 0.8, temperature, right_rows=True))
    assert_repaired("smooth", smooth_logits(TEACHER, TARGET, 0.9, temperature))
    assert_repaired("revise", revise_logits(TEACHER, TARGET, 0.8, 1.0))
    assert_repaired("loca(temperature=3,eta=0.9)", revise_logits(TEACHER, TARGET, 0.9, 3.0))


def test_records_of_label_revision_are_those_of_before():
    "Neither its settings nor its numbers changed when it learned other temperatures."
    method = create_method("kd+revise")
    assert method.as_record() == {"name": "kd+revise", "repair": "revise", "objective": "kd",
                                  "ce_weight": 0.1, "kd_weight": 0.9, "warmup_epochs": 0,
                                  "standardize": False, "settings": {"temperature": 4.0}}
    other = create_method("kd+revise(temperature=4)").as_record()
    assert other["repair_settings"] == {"temperature": 4.0} and other["name"] != method.name


def test_own_numbers_reach_the_loss_and_the_repair():
    repaired = revise_logits(TEACHER, TARGET, eta=0.5)
    expected = 0.1 * F.cross_entropy(STUDENT, TARGET) + 0.5 * kd_loss(STUDENT, repaired, 2.0)
    assert loss_of("kd(temperature=2,kd_weight=0.5)+revise(eta=0.5)") == expected


@pytest.mark.parametrize(("name", "message"), [
    ("kd+sorted", "Did you mean 'kd+sort'"), ("ce+sort", "no teacher"),
    ("dist+skip", "relates the rows"), ("kd(temperature=0)", "temperature must be greater than 0"),
    ("kd(temp=2)", "kd has no setting temp; it has ce_weight, kd_weight, warmup_epochs, temp"),
    ("kd(temperature=warm)", "a finite number from 0 to 100000, but it is 'warm'"),
    ("kd+revise(eta=1)", "eta must lie between 0 and 1"),
    ("kd+smooth(confidence=0.005)", "confidence must lie between 1 / 100 and 1"),
    ("dkd(warmup_epochs=2.5)", "warmup_epochs of dkd must be a whole number from 0 to 100000"),
    ("kd(temperature=4,temperature=5)", "temperature is given twice"),
    ("kd+sort(eta=1)", "sort has no setting eta; it has none"),
    *((name, "give objectives (ce, kd") for name in ("+kd", "kd+", "kd(temp", "kd+sort+sort"))])
def test_methods_that_do_not_exist(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_method(name)
    if name == "kd(temp=2)":
        with pytest.raises(ValueError, match=re.escape(message)):
            create_method("kd", temp=2)


NUMBERS = [(f"kd+{repair}", key, value)
           for repair in REPAIRS for key, value in numbers_of(REPAIRS[repair]).items()]
NUMBERS += [(name, key, value) for name, each in OBJECTIVES.items() for key, value in {
    "ce_weight": each.ce_weight, "warmup_epochs": each.warmup_epochs, **each.settings}.items()]


@pytest.mark.parametrize(("method", "key", "default"), NUMBERS, ids=str)
def test_every_number_has_a_range(method, key, default):
    "Twice and half of it do work; beyond the range, as a change or in a name, it is refused."
    whole, (lowest, highest) = isinstance(default, int), range_of(default)
    below_one = key in ("eta", "confidence", "strong_confidence")
    for value in (default * 2 if not below_one else 0.99, default // 2 if whole else default / 2):
        create_method(f"{method}({key}={value})")
    refused = pytest.raises(ValueError, match=f"{key} of [a-z_]+ must be a (whole|finite) number")
    step = 1 if whole else 1e-7
    for value in (lowest - step, highest + step * highest, 1e300, "nan", 0.5 if whole else "inf"):
        with refused:
            create_method(f"{method}({key}={value})")
    if "+" not in method:
        with refused:
            create_method(method, **{key: lowest - step})


def test_a_method_is_tried_before_it_is_planned():
    method = create_method("kd+smooth(confidence=0.05)")
    try_out(method, 30)
    with pytest.raises(ValueError, match="between 1 / 10 and 1, but it is 0.05"):
        try_out(method, 10)
    before = torch.get_rng_state()
    with torch.device("meta"):
        create_method("ctkd(end=3)+sort")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_special_logits(name):
    "The table of chapter 02: in every case as the limit of float64 has it, or openly none."
    method = create_method(name)
    for case, (masked, *_) in CASES.items():
        allowed = {"NaN"} if masked and method.objective in NO_LIMIT else {"right"}
        if method.objective == "ldrld" and masked:
            allowed |= {"finite"}
        if masked == "student" or masked == "teacher" and method.objective in INFINITE:
            # nothing is left of a loss whose rows are all skipped
            allowed |= {"∞", "right"}
        assert outcome(name, case) in allowed, case


def test_warm_up():
    for epoch, ramp in ((1, 1 / 20), (20, 1.0), (100, 1.0)):
        expected = ramp * dkd_loss(STUDENT, SORTED, TARGET) + F.cross_entropy(STUDENT, TARGET)
        torch.testing.assert_close(loss_of("dkd+sort", epoch=epoch), expected)


def test_skipped_rows_are_never_taken_for_logits():
    skipped = skip_logits(TEACHER, TARGET)
    assert kd_loss(STUDENT, skipped).isnan() and dkd_loss(STUDENT, skipped, TARGET).isnan()
    broken = TEACHER.clone()
    broken[0, 0] = torch.nan
    assert loss_of("kd+skip", teachers=(broken, broken)).isnan()


def test_an_experiment_gives_the_pair_its_beta_and_no_other_objective():
    plan = prepare_experiment(pair="r56_r20", methods="dkd,lskd_dkd+sort,dist,ctkd_dkd",
                           dataset="digits", device="cpu")
    dkd, lskd_dkd, dist, ctkd_dkd = plan.methods
    assert dkd.settings["beta"] == lskd_dkd.settings["beta"] == PAIRS["r56_r20"].beta == 2
    assert lskd_dkd.kd_weight == 18 and lskd_dkd.settings["temperature"] == 3  # of this pair
    assert dist == create_method("dist")
    wide = prepare_experiment(pair="r32x4_r8x4", methods="ctkd_dkd", dataset="digits", device="cpu")
    assert wide.methods[0].settings["beta"] == ctkd_dkd.settings["beta"] == 2
