"Objectives, repairs and their compositions: every golden, what must hold without one, and what is refused."
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from conftest import needs_cifar100
from sortkd.data import load_cifar100, normalize
from sortkd.experiments import plan_experiment
from sortkd.pairs import PAIRS
from sortkd.losses import (OBJECTIVES, REPAIRS, LearnedTemperature, create_method, curriculum_factor, dist_loss, dkd_loss, kd_loss,
                           list_methods, mlkd_loss, revise_logits, skip_logits, sld_loss, standardize)
from sortkd.sorting import sort_logits, swap_logits
from sortkd.teachers import load_teacher

ROOT = Path(__file__).parent.parent
GOLDENS = {name: torch.from_numpy(value) for file in ("losses", "dist", "mlkd")
           for name, value in np.load(Path(__file__).parent / "goldens" / f"{file}.npz").items()}
STUDENT, TEACHER, TARGET = GOLDENS["zs"], GOLDENS["zt"], GOLDENS["y"]
STRONG_STUDENT, STRONG_TEACHER = GOLDENS["zs_strong"], GOLDENS["zt_strong"]
SORTED = sort_logits(TEACHER, TARGET)
WRONG = TEACHER.argmax(1) != TARGET  # six of sixteen rows


def cases():
    for temperature in (1, 2, 4):
        for middle, teacher in (("", TEACHER), ("_sort", SORTED)):
            yield f"kd{middle}_T{temperature}", lambda z, t=teacher, T=temperature: kd_loss(z, t, T)
            yield f"lskd{middle}_T{temperature}", lambda z, t=teacher, T=temperature: kd_loss(standardize(z), standardize(t), T)
    for beta in (0.5, 2, 6, 8):
        yield f"dkd_a1_b{beta}_T4", lambda z, b=beta: dkd_loss(z, TEACHER, TARGET, beta=b)
        yield f"dkd_sort_a1_b{beta}_T4", lambda z, b=beta: dkd_loss(z, SORTED, TARGET, beta=b)
        yield f"dkd_lskd_a1_b{beta}_T2", lambda z, b=beta: dkd_loss(standardize(z), standardize(TEACHER), TARGET, beta=b, temperature=2.0)
    for before, teacher in (("", TEACHER), ("sort_", SORTED)):
        for tau in (1, 4):
            for name, weights in (("b1_g1", (1, 1)), ("b2_g2", (2, 2)), ("inter", (1, 0)), ("intra", (0, 1))):
                yield f"{before}dist_{name}_tau{tau}", lambda z, t=teacher, w=weights, T=tau: dist_loss(z, t, *w, T)


@pytest.mark.parametrize("name,objective", list(cases()), ids=lambda value: value if isinstance(value, str) else "")
def test_golden(name, objective):
    student = STUDENT.clone().requires_grad_()
    loss = objective(student)
    gradient, = torch.autograd.grad(loss, student)
    for ours, golden, tolerance in ((loss.detach(), GOLDENS[name], 1e-5), (gradient, GOLDENS[f"{name}_grad"], 1e-4)):
        assert (ours - golden).norm() / golden.norm() < tolerance


def loss_of(name, student=STUDENT, strong_student=STRONG_STUDENT, epoch=1, rows=slice(None), teachers=(TEACHER, STRONG_TEACHER),
            target=TARGET, learned=None, **changes):
    "The loss of a method by its name, with the strong views and the learned temperature that it asks for."
    method = create_method(name, **changes)
    target = target[rows]
    repaired, strong_repaired = (method.repair_logits(each[rows], target) for each in teachers)
    return method.loss(student[rows], repaired if method.uses_teacher else None, target, epoch,
                       (strong_student[rows], strong_repaired) if method.strong_views else None,
                       learned or method.create_temperature())


def two_view_cases():
    for golden, name, changes in (("mlkd", "mlkd", {}), ("mlkd_sort", "mlkd+sort", {}),
                                  ("mlkd_lskd", "lskd_mlkd", {"kd_weight": 0.9, "temperature": 4.0}),
                                  ("mlkd_lskd_sort", "lskd_mlkd+sort", {"kd_weight": 0.9, "temperature": 4.0})):
        yield f"{golden}_ce0.1_kd0.9_T4", lambda z, strong, n=name, c=changes: loss_of(n, z, strong, **c)
    for temperature in (2, 3, 4, 6):
        for repair in ("", "sort"):
            for name, golden, weight in (("mlkd", "mlkd", 0.9), ("lskd_mlkd", "mlkd_lskd", 9)):
                yield (f"{golden}{'_sort' if repair else ''}_ce0.1_kd{weight}_T{temperature}",
                       lambda z, strong, n="+".join(filter(None, (name, repair))), T=float(temperature): loss_of(n, z, strong, temperature=T))
    for epoch in (10, 200):  # made with weights 1
        yield f"sld_epoch{epoch}", lambda z, strong, e=epoch: loss_of("sld", z, strong, e, ce_weight=1.0, kd_weight=1.0)


@pytest.mark.parametrize("name,objective", list(two_view_cases()), ids=lambda value: value if isinstance(value, str) else "")
def test_golden_of_two_views(name, objective):
    views = STUDENT.clone().requires_grad_(), STRONG_STUDENT.clone().requires_grad_()
    loss = objective(*views)
    gradients = torch.autograd.grad(loss, views)
    assert abs(loss - GOLDENS[name]) / GOLDENS[name] < 1e-5
    for gradient, golden in zip(gradients, (f"{name}_grad", f"{name}_grad_strong")):
        if golden in GOLDENS:
            assert (gradient - GOLDENS[golden]).norm() / GOLDENS[golden].norm() < 1e-4


def test_every_golden_is_compared():
    names = {name for name, _ in (*cases(), *two_view_cases())} | {"sort", "swap", "standardize", "ctkd_raw1_start1_end20"}
    inputs = {"zs", "zt", "zs_strong", "zt_strong", "y"}
    assert {f"{name}_grad_strong" for name, _ in two_view_cases() if name.startswith("mlkd")} <= set(GOLDENS)
    gradients = {f"{name}_grad" for name in names} | {f"{name}_grad_strong" for name in names} | {"ctkd_grad", "ctkd_raw_grad_lambda-0.5"}
    assert set(GOLDENS) - names - inputs - gradients == set()


def test_sld_lets_the_student_teach_only_after_epoch_150():
    def at(epoch, name="sld", **changes): return loss_of(name, epoch=epoch, **changes)

    assert at(150) == at(1) < at(151) == at(240)
    assert at(11, student_teaches_after=10) == at(240) and at(240, "sld+sort") != at(240)
    swapped = [swap_logits(teacher, TARGET) for teacher in (TEACHER, STRONG_TEACHER)]
    torch.testing.assert_close(at(1), loss_of("sld+none", teachers=swapped))


def test_what_a_method_asks_for_is_not_forgotten():
    for name, words in (("mlkd", "strong"), ("sld+sort", "strong"), ("ctkd", "create_temperature"), ("ctkd_dkd+sort", "create_temperature")):
        method = create_method(name)
        assert method.strong_views == (words == "strong") and (method.create_temperature() is None) == method.strong_views
        with pytest.raises(ValueError, match=words):
            method.loss(STUDENT, TEACHER, TARGET, 1)


def test_a_schedule_tells_the_epochs_whose_losses_differ():
    for name in list_methods():
        schedules = [create_method(name).schedule(epoch) for epoch in range(1, 241)]
        changes = [epoch for epoch in range(2, 241) if schedules[epoch - 1] != schedules[epoch - 2]]
        objective = name.partition("+")[0]
        assert changes == {"dkd": [*range(2, 21)], "lskd_dkd": [*range(2, 21)], "ctkd": [*range(2, 11)],
                           "ctkd_dkd": [*range(2, 11)], "sld": [151]}.get(objective, []), name


def test_learned_temperature():
    learned, student = LearnedTemperature(), STUDENT.clone().requires_grad_()
    raw = learned.raw
    loss = kd_loss(student, TEACHER, learned(-0.5)).squeeze()
    loss.backward()
    for ours, golden, tolerance in ((loss.detach(), "ctkd_raw1_start1_end20", 1e-5), (student.grad, "ctkd_grad", 1e-4),
                                    (raw.grad, "ctkd_raw_grad_lambda-0.5", 1e-4)):
        assert (ours - GOLDENS[golden]).norm() / GOLDENS[golden].norm() < tolerance
    learned = LearnedTemperature(2.0, 10.0)
    loss_of("ctkd", learned=learned, epoch=5).backward()
    lower = LearnedTemperature(2.0, 10.0)
    loss_of("ctkd", learned=lower, epoch=10).backward()
    assert learned().item() == pytest.approx(2 + 10 / (1 + np.exp(-1))) and learned.raw.grad == lower.raw.grad / 2 != 0
    factors = [curriculum_factor(epoch) for epoch in range(1, 241)]
    assert all(later <= earlier for earlier, later in zip([0.0, *factors], factors)) and factors[9:] == [-1.0] * 231


def numpy_distance(first, second):
    "Pearson's distance with 1e-8 added to the product of the two lengths."
    lengths = np.sqrt(first.var(1) * second.var(1)) * first.shape[1]
    correlations = np.array([scipy.stats.pearsonr(one, other).statistic for one, other in zip(first, second)])
    return np.mean(1 - correlations * lengths / (lengths + 1e-8))


def test_dist_is_pearson_with_the_authors_epsilon():
    student, teacher = (torch.softmax(z.double() / 3, 1).numpy() for z in (STUDENT, TEACHER))
    expected = 9 * (0.5 * numpy_distance(student, teacher) + 2 * numpy_distance(student.T, teacher.T))
    assert abs(dist_loss(STUDENT.double(), TEACHER.double(), 0.5, 2.0, 3.0) - expected) < 1e-12
    assert abs(dist_loss(STUDENT, TEACHER, 0.5, 2.0, 3.0) - expected) < 1e-4


def test_the_numbers_of_the_papers():
    "The weights, lengths and milestones of the public code; the DKD paper's beta by pair belongs to DKD alone."
    sld, ctkd_dkd = create_method("sld"), create_method("ctkd_dkd")
    assert (sld.ce_weight, sld.kd_weight) == (0.1, 0.9)
    assert (ctkd_dkd.warmup_epochs, ctkd_dkd.settings["beta"], ctkd_dkd.ramp(1)) == (0, 2.0, 1.0)
    assert {name for name, each in OBJECTIVES.items() if each.pair_beta} == {"dkd", "lskd_dkd"}
    assert {name: each.milestones for name, each in OBJECTIVES.items() if each.milestones} == dict.fromkeys(["mlkd", "lskd_mlkd"], (150, 180, 210))
    assert {name for name, each in OBJECTIVES.items() if each.epochs != 240} == {"mlkd", "lskd_mlkd"}


def test_dist_sees_relations_only():
    probabilities = torch.softmax(TEACHER.double() / 4, 1)
    squeezed = 4 * (0.3 * probabilities + 0.7 / 100).log()  # a positive affine map of the probabilities, as logits at temperature 4
    assert abs(dist_loss(squeezed, TEACHER.double())) < 5e-3  # the epsilon
    assert kd_loss(squeezed, TEACHER.double()) > 0.01
    torch.testing.assert_close(dist_loss(STUDENT.double(), squeezed), dist_loss(STUDENT.double(), TEACHER.double()), rtol=1e-3, atol=0)
    assert dist_loss(TEACHER.double(), TEACHER.double()).abs() < 1e-3


def test_dist_gradient():
    student, teacher = STUDENT[:5, :7].double().requires_grad_(), TEACHER[:5, :7].double()
    assert torch.autograd.gradcheck(lambda z: dist_loss(z, teacher, 1.0, 3.0, 2.0), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_without_variance(dtype):
    flat = torch.zeros(4, 10, dtype=dtype, requires_grad=True)  # every row and every class is constant
    loss = dist_loss(flat, torch.randn(4, 10, dtype=dtype), 2.0, 3.0, 4.0)
    loss.backward()
    assert loss == 16 * (2 + 3) and not flat.grad.any()
    one_row = STUDENT[:1].to(dtype).requires_grad_()  # one sample: every class is constant over the rows
    torch.testing.assert_close(dist_loss(one_row, TEACHER[:1].to(dtype)), dist_loss(one_row, TEACHER[:1].to(dtype), 2.0, 0.0) + 32)


def test_revise_is_the_mixture():
    assert WRONG.sum() == 6
    for eta in (0.5, 0.8, 0.99):
        revised = revise_logits(TEACHER, TARGET, eta=eta)
        teacher = torch.softmax(TEACHER.double(), 1)
        own = teacher.gather(1, TARGET[:, None])
        beta = eta / (teacher.amax(1, keepdim=True) - own + 1)
        mixture = beta * teacher + (1 - beta) * F.one_hot(TARGET, 100)
        torch.testing.assert_close(torch.softmax(revised[WRONG].double(), 1), mixture[WRONG], rtol=1e-4, atol=1e-7)
        assert torch.equal(revised.argmax(1), TARGET) and torch.equal(revised[~WRONG], TEACHER[~WRONG])
        others = torch.ones_like(TEACHER).scatter(1, TARGET[:, None], 0).bool()
        assert torch.equal(revised[others], TEACHER[others])


SPECIAL_ROWS = torch.tensor([
    [3., 5., 5., 1.],  # the target ties with the top: right
    [float("nan"), 9., 5., 1.],
    [2., 7., 1., 7.],  # padding
    [float("inf"), 1., 2., 3.],
    [float("-inf"), 4., float("-inf"), 1.],
    [1., 6., 2., 6.],  # two classes share the top
])
SPECIAL_TARGET = torch.tensor([1, 2, -100, 1, 2, 0])


def test_special_rows_of_revise_and_skip():
    revised, skipped = revise_logits(SPECIAL_ROWS, SPECIAL_TARGET), skip_logits(SPECIAL_ROWS, SPECIAL_TARGET)
    same = torch.tensor([True, True, True, True, False, False])
    assert torch.equal(revised[same].nan_to_num(0.5), SPECIAL_ROWS[same].nan_to_num(0.5))
    assert torch.equal(revised[~same].argmax(1), SPECIAL_TARGET[~same]) and revised[5].isfinite().all()
    marked = skipped.amax(1) == -torch.inf
    assert marked.tolist() == [False, False, False, True, True, True]
    assert torch.equal(skipped[:3].nan_to_num(0.5), SPECIAL_ROWS[:3].nan_to_num(0.5))


@pytest.mark.parametrize("repair", [revise_logits, skip_logits])
def test_repairs_of_any_layout_and_type(repair):
    expected = repair(TEACHER, TARGET)
    assert torch.equal(repair(TEACHER.T, TARGET, dim=0).T, expected)
    assert torch.equal(repair(TEACHER.view(4, 4, 100), TARGET.view(4, 4)).view(16, 100), expected)
    assert torch.equal(repair(TEACHER[0], TARGET[0]), expected[0])
    assert torch.equal(torch.compile(repair, fullgraph=True, backend="aot_eager")(TEACHER, TARGET), expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for scale in (1, 2000):
            logits = (TEACHER * scale).to(dtype)
            repaired, wrong = repair(logits, TARGET), logits.amax(1) > logits.gather(1, TARGET[:, None])[:, 0]
            assert repaired.dtype == dtype and torch.equal(repaired[~wrong], logits[~wrong])
            if repair is revise_logits:
                if dtype != torch.float64:  # computed in float32 and rounded once
                    assert torch.equal(repaired, repair(logits.float(), TARGET).to(dtype))
                assert repaired.isfinite().all() and torch.equal(repaired.amax(1), repaired.gather(1, TARGET[:, None])[:, 0])


@needs_cifar100
def test_the_stored_outputs_are_the_teachers():
    stored = np.load(ROOT / "nbs" / "assets" / "teacher_logits.npz")
    index, target, logits = (torch.from_numpy(stored[name]) for name in ("index", "target", "logits"))
    cifar = load_cifar100(download=False)
    network = load_teacher(ROOT / "teachers" / "resnet56-cifar100-10epochs.safetensors", "resnet56", 100).model
    with torch.inference_mode():
        ours = network(normalize(cifar.train_images[index.long()], cifar.mean, cifar.std))
    assert torch.equal(cifar.train_targets[index.long()], target.long()) and (logits.argmax(1) != target).all()
    assert (ours - logits).abs().max() < 0.02


def test_revise_gradient():
    logits = TEACHER[:6, :9].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: revise_logits(z, torch.arange(6)), logits)


@pytest.mark.parametrize("objective", ["kd", "dkd", "lskd", "lskd_dkd", "ctkd", "ctkd_dkd", "sld"])
def test_skip_leaves_out_the_wrong_rows(objective):
    teacher, target = torch.cat([TEACHER, SORTED]), torch.cat([TARGET, TARGET])  # wrong rows, then right ones
    students = torch.cat([STUDENT, STUDENT])
    alone = objective if objective != "sld" else "sld+none"

    def term(name, rows):
        student = students[rows].clone().requires_grad_()
        loss = loss_of(name, student, student, teachers=(teacher[rows], teacher[rows]), target=target[rows],
                       ce_weight=0.0, warmup_epochs=0)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    right = teacher.argmax(1) == target
    loss, gradient = term(f"{objective}+skip", slice(None))
    expected, expected_gradient = term(alone, right)
    share = right.float().mean()
    torch.testing.assert_close(loss, expected * share)
    torch.testing.assert_close(gradient[right], expected_gradient * share)
    assert gradient[~right].abs().max() < 1e-6 * gradient[right].abs().max()
    nothing, no_gradient = term(f"{objective}+skip", ~right)
    assert nothing.abs() < 1e-6 and no_gradient.abs().max() < 1e-6


def test_skipped_rows_are_never_taken_for_logits():
    skipped = skip_logits(TEACHER, TARGET)
    assert kd_loss(STUDENT, skipped).isnan() and dkd_loss(STUDENT, skipped, TARGET).isnan()
    broken = TEACHER.clone()
    broken[0, 0] = torch.nan
    method = create_method("kd+skip")
    assert method.loss(STUDENT, method.repair_logits(broken, TARGET), TARGET, 1).isnan()


def test_lskd_weights():
    cross_entropy = F.cross_entropy(STUDENT, TARGET)
    for name, golden in (("lskd", "lskd_T2"), ("lskd+sort", "lskd_sort_T2")):
        method = create_method(name)
        loss = method.loss(STUDENT, method.repair_logits(TEACHER, TARGET), TARGET, 1)
        torch.testing.assert_close(loss, 0.1 * cross_entropy + 9 * GOLDENS[golden])
    method = create_method("lskd_dkd", beta=6.0)
    for epoch, ramp in ((5, 0.25), (20, 1.0)):
        torch.testing.assert_close(method.loss(STUDENT, TEACHER, TARGET, epoch), cross_entropy + 9 * ramp * GOLDENS["dkd_lskd_a1_b6_T2"])


def test_list_of_methods():
    names = list_methods()
    assert len(names) == len(set(names)) == 1 + 5 * 7 + 4 * 3
    assert {"ce", "kd", "dkd+sort", "lskd+skip", "lskd_dkd+revise", "dist+swap", "sld", "sld+none", "mlkd+sort", "ctkd_dkd"} < set(names)
    assert create_method("sld").repair == "swap" and create_method("sld+sort").repair == "sort"
    for name in names:
        method = create_method(name)
        assert json.loads(json.dumps(asdict(method))) == asdict(method)
        assert method.standardize is OBJECTIVES[method.objective].standardize


def test_an_experiment_gives_the_pair_its_beta_and_no_other_objective():
    plan = plan_experiment("r56_r20", "dkd,lskd_dkd+sort,dist,ctkd_dkd", dataset="digits", device="cpu")
    dkd, lskd_dkd, dist, ctkd_dkd = plan.methods
    assert dkd.settings["beta"] == lskd_dkd.settings["beta"] == PAIRS["r56_r20"].beta == 2
    assert lskd_dkd.kd_weight == 18 and lskd_dkd.settings["temperature"] == 3  # of this pair, by the name of its log
    assert dist == create_method("dist")
    wide = plan_experiment("r32x4_r8x4", "ctkd_dkd", dataset="digits", device="cpu")
    assert PAIRS["r32x4_r8x4"].beta == 8 and wide.methods[0].settings["beta"] == ctkd_dkd.settings["beta"] == 2


def test_golden_repairs():
    assert torch.equal(SORTED, GOLDENS["sort"]) and torch.equal(swap_logits(TEACHER, TARGET), GOLDENS["swap"])
    assert (standardize(TEACHER) - GOLDENS["standardize"]).norm() / GOLDENS["standardize"].norm() < 1e-5


def test_temperature_may_be_learned():
    temperature = torch.tensor(4.0, requires_grad=True)
    kd_loss(STUDENT, TEACHER, temperature).backward()
    step = 1e-2
    numeric = (kd_loss(STUDENT.double(), TEACHER.double(), 4 + step) - kd_loss(STUDENT.double(), TEACHER.double(), 4 - step)) / (2 * step)
    assert abs(temperature.grad - numeric) < 1e-3 * abs(numeric)


def test_token_sequences_average_over_all_tokens():
    student, teacher, target = STUDENT.view(4, 4, 100), TEACHER.view(4, 4, 100), TARGET.view(4, 4)
    torch.testing.assert_close(kd_loss(student, teacher), kd_loss(STUDENT, TEACHER))
    torch.testing.assert_close(dkd_loss(student, teacher, target), dkd_loss(STUDENT, TEACHER, TARGET))


@pytest.mark.parametrize("name", list_methods())
def test_every_method_trains(name):
    students, temperature = [each.clone().requires_grad_() for each in (STUDENT, STRONG_STUDENT)], create_method(name).create_temperature()
    optimizer = torch.optim.SGD([*students, *(temperature.parameters() if temperature else [])], lr=0.1 if "mlkd" in name else 1.0)
    losses = []
    for _ in range(20):
        loss = loss_of(name, *students, epoch=20, learned=temperature)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert all(np.isfinite(losses)) and losses[-1] < losses[0]


def test_weights_and_warm_up():
    repaired = SORTED
    dkd = create_method("dkd+sort", beta=6.0)
    for epoch, ramp in ((1, 1 / 20), (20, 1.0), (100, 1.0)):
        expected = F.cross_entropy(STUDENT, TARGET) + ramp * dkd_loss(STUDENT, repaired, TARGET, beta=6.0)
        torch.testing.assert_close(dkd.loss(STUDENT, repaired, TARGET, epoch), expected)
    kd = create_method("kd", temperature=2.0, kd_weight=3.0)
    torch.testing.assert_close(kd.loss(STUDENT, TEACHER, TARGET, 1), 0.1 * F.cross_entropy(STUDENT, TARGET) + 3 * kd_loss(STUDENT, TEACHER, 2.0))


@pytest.mark.parametrize("call,words", [
    (lambda: kd_loss(STUDENT, TEACHER[:8]), r"\(8, 100\)"),
    (lambda: kd_loss(STUDENT[0], TEACHER[0]), r"\(100,\)"),
    (lambda: kd_loss(STUDENT[:, :1], TEACHER[:, :1]), "two classes"),
    (lambda: kd_loss(STUDENT, TEACHER, 0.0), "temperature"),
    (lambda: kd_loss(STUDENT, TEACHER, float("nan")), "temperature"),
    (lambda: dkd_loss(STUDENT, TEACHER, TARGET[:3]), r"\(3,\)"),
    (lambda: standardize(torch.zeros(4, 1)), "two classes"),
    (lambda: create_method("kd+sorted"), "kd\\+sort"),
    (lambda: create_method("ce+sort"), "no teacher"),
    (lambda: create_method("dist+skip"), "relates the rows"),
    (lambda: create_method("kd+none"), "'kd' alone is its name"),
    (lambda: create_method("dist", beta=2.0), "beta"),
    (lambda: dist_loss(STUDENT, TEACHER[:8]), r"\(8, 100\)"),
    (lambda: dist_loss(STUDENT, TEACHER, temperature=0.0), "temperature"),
    (lambda: mlkd_loss(STUDENT, TEACHER, STUDENT, TEACHER[:8]), r"\(8, 100\)"),
    (lambda: sld_loss(STUDENT, TEACHER, STUDENT, TEACHER, TARGET[:3]), r"\(3,\)"),
    (lambda: create_method("mlkd+skip"), "relates the rows"),
    (lambda: create_method("sld+swap"), "'sld' alone is its name"),
    (lambda: revise_logits(TEACHER, TARGET, eta=1.0), "eta"),
    (lambda: revise_logits(TEACHER, TARGET[:3]), r"\(3,\)"),
    (lambda: skip_logits(TEACHER, TARGET + 100), "target holds"),
    (lambda: create_method("kd", beta=1.0), "beta"),
])
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("outside", [-1, 100])
def test_dkd_refuses_a_target_out_of_range(outside):
    target = TARGET.clone()
    target[3] = outside
    with pytest.raises(ValueError, match=str(outside)):
        dkd_loss(STUDENT, TEACHER, target)
