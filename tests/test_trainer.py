"The trainer against a loop by hand, to the last bit; resuming; which run a checkpoint belongs to."
import itertools
import math
import os
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK_METHODS, raises, seeded_network
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sortkd.methods import create_method
from sortkd.train.augmentation import Batches, draw_views
from sortkd.train.batches import teacher_blocks
from sortkd.train.checkpoints import Checkpoint, fingerprint
from sortkd.train.cuda_graphs import CapturedStep
from sortkd.train.devices import Ranks, create_fabric
from sortkd.train.images import load_digits
from sortkd.train.networks import create_model
from sortkd.train.teacher_logits import CachedTeacherLogits, TeacherLogits
from sortkd.train.trainer import (
    Learner, Recipe, Student, evaluate, train, train_epoch, train_together)

# 150 images: two batches of 64 and one of 22. The learning rate falls after epochs 2 and 3.
RECIPE = Recipe(epochs=4, batch_size=64, lr=0.08, weight_decay=0.05, milestones=(2, 3))
RATES = [0.08, 0.08, 0.08 * 0.1, 0.08 * 0.1**2]
ONE_EPOCH = replace(RECIPE, epochs=1, batch_size=4, lr=0.01)  # 38 steps, the last of two images
CE = create_method("ce")


@pytest.fixture(scope="module")
def batches():
    return Batches(load_digits().subset(train_size=150, test_size=120))


@pytest.fixture(scope="module")
def fabric():
    return create_fabric("cpu", "float32")


def network(seed: int) -> nn.Module:
    return seeded_network(seed=seed).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def teacher():
    "Right on some images, wrong on others."
    return network(7).eval().requires_grad_(False)


def with_dropout(seed: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 10))


def logits_on_test_images(model, batches):
    with torch.no_grad():
        return model.eval()(next(batches.test(1000))[0])


def teacher_logits(teacher, images):
    with torch.no_grad():  # in multiples of 32 rows, which have the same last bits
        full = torch.cat([images, images[:1].expand(-len(images) % 32, -1, -1, -1)])
        return teacher(full.contiguous(memory_format=torch.channels_last))[: len(images)]


def train_by_hand(student, batches, recipe=RECIPE, rates=RATES, seed=0, method=CE, teacher=None):
    "Weights after each epoch and the curve, with nothing but batches, a loss and SGD."
    test_target, curve, weights = batches.data.test_targets, [], []
    groups = [{"params": list(student.parameters()), "weight_decay": recipe.weight_decay}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, fused=True)
    for epoch, lr in enumerate(rates, 1):
        optimizer.param_groups[0]["lr"] = lr
        total, hits, wrong, changed = 0.0, 0, 0, 0
        for images, target, _ in batches.train(recipe.batch_size, seed, epoch):
            logits = student.train()(images)
            if teacher is None:
                loss = F.cross_entropy(logits, target)
            else:
                given = teacher_logits(teacher, images)
                repaired = method.repair_logits(given, target)
                loss = method.loss(logits, repaired, target, epoch)
                wrong += (given.argmax(1) != target).sum().item()
                changed += (repaired != given).any(1).sum().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += (loss.detach() * len(target)).item()
            hits += (logits.argmax(1) == target).sum().item()
        row = {"epoch": epoch, "lr": lr, "train_loss": total / 150, "train_top1": 100 * hits / 150}
        row |= {} if teacher is None else {"teacher_wrong_rows": wrong, "changed_rows": changed}
        logits = logits_on_test_images(student, batches)
        row["test_loss"] = F.cross_entropy(logits, test_target, reduction="sum").item() / 120
        row["test_top1"] = 100 * (logits.argmax(1) == test_target).sum().item() / 120
        curve.append(row)
        weights.append({name: value.clone() for name, value in student.state_dict().items()})
    return weights, curve


def without_time(curve):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in curve]


def assert_same_weights(ours, expected):
    assert ours.keys() == expected.keys()
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name


def assert_same_run(ours, expected):
    assert without_time(ours.curve) == without_time(expected.curve)
    assert_same_weights(ours.last_weights, expected.last_weights)
    assert_same_weights(ours.best_weights, expected.best_weights)


def test_training_is_sgd_on_the_cross_entropy(batches, fabric):
    "Momentum, weight decay on all parameters, the schedule, the metrics, last and best weights."
    weights, curve = train_by_hand(network(8), batches)
    outcome = train(network(8), batches, CE, RECIPE, fabric)
    assert without_time(outcome.curve) == curve and not outcome.captured
    assert_same_weights(outcome.last_weights, weights[-1])
    best = max(range(4), key=lambda epoch: curve[epoch]["test_top1"])
    assert best < 3, "choose another seed: the best epoch must differ from the last"
    assert outcome.best["epoch"] == best + 1 and outcome.last["epoch"] == 4
    assert_same_weights(outcome.best_weights, weights[best])


@pytest.mark.parametrize("name,recipe", [
    ("kd", RECIPE), ("kd+sort", RECIPE), ("dkd+sort", RECIPE), ("kd+sort", ONE_EPOCH)])
def test_distillation_is_sgd_on_the_methods_loss(batches, fabric, teacher, name, recipe):
    "The teacher sees the same images in evaluation mode, and its logits are repaired row by row."
    method, rates = create_method(name), RATES if recipe is RECIPE else [0.01]
    weights, curve = train_by_hand(network(1), batches, recipe, rates, 3, method, teacher)
    outcome = train(network(1), batches, method, recipe, fabric, teacher=teacher, seed=3)
    assert without_time(outcome.curve) == curve
    assert_same_weights(outcome.last_weights, weights[-1])
    for row in curve:
        assert 0 < row["teacher_wrong_rows"] < 150
        assert row["changed_rows"] == (row["teacher_wrong_rows"] if "sort" in name else 0)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation(fabric, training):
    "Running statistics, all batches, and the mode and the weights of before."
    batches = Batches(load_digits().subset(train_size=10, test_size=330))
    target, model = batches.data.test_targets, network(1).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = evaluate(model, batches, fabric)
    assert model.training is training and found.images == 330
    assert_same_weights(model.state_dict(), before)
    logits = logits_on_test_images(model, batches)
    assert torch.equal(found.correct, logits.argmax(1) == target)
    assert found.top1 == 100 * found.correct.sum().item() / 330
    assert found.loss == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)


def test_random_numbers_follow_from_seed_and_epoch(batches, fabric):
    "Each has its own, and the caller's generator neither matters nor moves."
    drawn, recipe = [], replace(RECIPE, epochs=2, lr=0.01)

    def run(seed, state):
        model = with_dropout()
        model[1].register_forward_hook(  # the 22 images of an epoch's last step
            lambda layer, given, out: drawn.append(tuple((out[0, :40] == 0).tolist()))
            if layer.training else None)
        torch.manual_seed(state)
        outcome = train(model, batches, CE, recipe, fabric, seed=seed)
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(state).get_state())
        return outcome

    assert_same_run(run(4, 0), run(4, 1))
    run(5, 0)
    assert drawn[:6] == drawn[6:12] and len(set(drawn)) == 2 * 2 * 3  # three steps an epoch


def test_students_together_learn_what_each_learns_alone(batches, fabric, teacher):
    "To the bit: dropout, strong images, a learned temperature, other epochs and seeds, divergence."
    recipe = replace(RECIPE, epochs=3, lr=0.005)

    def students():
        recipes = recipe, replace(recipe, lr=1e30), replace(recipe, epochs=2), recipe
        names = "kd+sort", "ce", "mlkd+sort", "ctkd"
        return [Student(with_dropout(), create_method(name), own, seed)
                for name, own, seed in zip(names, recipes, (5, 5, 6, 5))]

    outcomes = train_together(students(), batches, fabric, teacher=teacher)
    assert isinstance(outcomes[1], FloatingPointError)
    for number in (0, 2, 3):
        each = students()[number]
        alone = train(each.model, batches, each.method, each.recipe, fabric, teacher=teacher,
                      seed=each.seed)
        assert_same_run(outcomes[number], alone)
    one, other = students()[::3]
    other.recipe = replace(RECIPE, batch_size=32)
    with pytest.raises(ValueError, match=r"one batch size, but they have \[32, 64\]"):
        train_together([one, other], batches, fabric, teacher=teacher)


def test_no_step_on_a_gpu_asks_for_a_value():
    "It could not be captured: where PyTorch knows shapes alone, such a question is an error."
    def loss_of(name):
        method, (student, teacher, strong, other) = create_method(name), torch.empty(4, 64, 100)
        repaired = method.repair_logits(teacher, target) if method.uses_teacher else None
        both = (strong, method.repair_logits(other, target)) if method.strong_views else None
        return method.loss(student, repaired, target, 100, both, method.create_temperature())

    with FakeTensorMode(), torch.device("cuda"):
        target = torch.empty(64, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            target.sum().item()
        assert {loss_of(name).device.type for name in QUICK_METHODS} == {"cuda"}
        for name in ("resnet8x4", "wrn_16_2", "vgg8", "ShuffleV1", "ShuffleV2", "MobileNetV2"):
            assert create_model(name, 100)(torch.empty(64, 3, 32, 32)).shape == (64, 100)


@pytest.mark.cuda
def test_captured_steps_on_a_gpu(monkeypatch, batches):
    "Neither a graph nor a second student, with a seed and a stream of its own, changes a bit."
    fabric, on_gpu = create_fabric("cuda", deterministic=True), batches.data.batches("cuda")

    def outcomes(*names_and_seeds):
        students = [Student(network(8), create_method(name), replace(RECIPE, batch_size=25), seed)
                    for name, seed in names_and_seeds]
        return train_together(students, on_gpu, fabric, teacher=network(7).eval())

    captured = outcomes(("ce", 1), ("kd+sort", 2))
    alone = outcomes(("ce", 1)) + outcomes(("kd+sort", 2))
    monkeypatch.setattr(CapturedStep, "warm_up", 10**9)
    eager = outcomes(("ce", 1), ("kd+sort", 2))
    assert all(each.captured for each in captured + alone)
    assert not any(each.captured for each in eager)
    for one, two, three in zip(captured, alone, eager):
        assert_same_weights(one.last_weights, two.last_weights)
        assert_same_weights(one.last_weights, three.last_weights)


def test_strongly_augmented_images_are_those_of_the_epoch(batches, fabric, teacher):
    data, logits = batches.data, TeacherLogits(teacher, batches)
    for epoch in (1, 2):
        block, = teacher_blocks(batches, logits, 64, 3, epoch, Ranks(fabric), strong=True)
        views = draw_views(150, data.pad, data.flip, 3, epoch)
        expected = batches.strong_images(views // data.views_per_image, 3, epoch, 0)
        assert torch.equal(torch.cat(block.strong_images), expected)
        with torch.no_grad():
            torch.testing.assert_close(
                block.strong_teacher_logits, teacher(expected), rtol=1e-4, atol=1e-4)


class Unplugged(Exception): ...


@pytest.mark.parametrize("name", ["kd+sort", "ctkd"])
def test_interrupted_after_epochs(batches, fabric, teacher, tmp_path, monkeypatch, name):
    "A resumed run ends as if it had not been interrupted; only missing epochs are trained."
    monkeypatch.setattr(Checkpoint, "seconds", 0)

    def run(**more):
        rows = []
        more["callbacks"] = [rows.append, *more.get("callbacks", ())]
        try:
            outcome = train(network(1), batches, create_method(name), RECIPE, fabric,
                            teacher=teacher, seed=2, **more)
        except Unplugged as interruption:
            outcome = type(interruption)
        return outcome, [row["epoch"] for row in rows]

    expected, epochs = run()
    assert epochs == [1, 2, 3, 4]
    kept, unplug = {"checkpoint": tmp_path / "run.pt"}, {"callbacks": [raises(Unplugged)]}
    assert run(**kept, **unplug) == (Unplugged, [1])
    assert run(**kept, **unplug) == (Unplugged, [2])
    for missing in ([3, 4], []):
        outcome, epochs = run(**kept)
        assert epochs == missing
        assert_same_run(outcome, expected)
        assert outcome.seconds == pytest.approx(sum(row["seconds"] for row in outcome.curve))


@pytest.mark.parametrize("error", [KeyboardInterrupt, Unplugged])
def test_interrupted_within_an_epoch(monkeypatch, batches, fabric, teacher, tmp_path, error):
    "Of the first of two students or the second, before a save is due: whole epochs are kept."
    names = "ctkd", "kd+sort"

    def run(steps=math.inf):
        rows, learn, count = [], Learner.learn, itertools.count(1)

        def interrupted(learner, batch):
            if next(count) == steps:
                raise error
            learn(learner, batch)

        students = [Student(network(1), create_method(name), RECIPE, 0, tmp_path / name,
                            callbacks=[rows.append]) for name in names]
        with monkeypatch.context() as patch:
            patch.setattr(Learner, "learn", interrupted)
            outcomes = train_together(students, batches, fabric, teacher=teacher)
        return outcomes, [row["epoch"] for row in rows]

    for steps in (3, 16):  # in the first epoch, in the third
        with pytest.raises(error):
            run(steps)
    resumed, epochs = run()
    assert epochs == [3, 3, 4, 4]
    for name, outcome in zip(names, resumed):
        assert_same_run(outcome, train(
            network(1), batches, create_method(name), RECIPE, fabric, teacher=teacher))


def test_an_interruption_while_an_interrupted_run_is_saved(monkeypatch, batches, fabric, tmp_path):
    "It ends the run; no half-written file is left."
    monkeypatch.setattr(os, "fsync", raises(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(network(1), batches, CE, RECIPE, fabric, checkpoint=tmp_path / "run.pt",
              callbacks=[raises(KeyboardInterrupt)])
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_belongs_to_one_run(fabric, teacher, tmp_path):
    "Whatever changes a run's numbers changes its fingerprint, which is that of old versions."
    data, checkpoint = load_digits().subset(train_size=40, test_size=20), tmp_path / "run.pt"
    batches, recipe = Batches(data), Recipe(epochs=1, batch_size=20, milestones=())
    given = {"model": network(1), "batches": batches, "method": create_method("kd"),
             "recipe": recipe, "fabric": fabric, "teacher": teacher}

    def run(**changes):
        return train(checkpoint=checkpoint, **given | changes)

    first = run()
    # Checkpoints of earlier versions must be found: this expression may not change.
    method = asdict(given["method"])
    del method["repair_settings"]
    parts = asdict(recipe), method, data.checksum, 0, "ResNet", "float32", "computed", ""
    assert torch.load(checkpoint, weights_only=True)["run"] == fingerprint(*parts)
    assert without_time(run().curve) == without_time(first.curve)  # read, not trained

    images = data.train_images.clone()
    images[0, 0, 0, 0] ^= 1
    content = checkpoint.read_bytes()
    others = [
        {"batches": Batches(replace(data, train_images=images))},
        {"batches": Batches(load_digits().subset(train_size=41, test_size=20))},
        {"method": create_method("kd+sort")}, {"method": create_method("kd", kd_weight=0.5)},
        {"recipe": replace(recipe, lr=0.04)}, {"seed": 1}, {"model": create_model("vgg8", 10)},
        {"fabric": create_fabric("cpu", "bfloat16")}, {"context": "another teacher"},
        {"teacher": CachedTeacherLogits(teacher, batches, tmp_path / "kept")}]
    for other in others:
        with pytest.raises(ValueError, match="belongs to a run with other settings"):
            run(**other)
    assert checkpoint.read_bytes() == content


def test_refusals(batches, fabric):
    with pytest.raises(ValueError, match="method 'kd' .*teacher is None"):
        train(network(1), batches, create_method("kd"), RECIPE, fabric)
    with pytest.raises(FloatingPointError, match="loss of ce is (nan|inf) in epoch 1; lower the"):
        train(network(1), batches, CE, replace(RECIPE, lr=1e30), fabric)
    for name, value in (("epochs", 0), ("batch_size", 1.5), ("lr", math.nan), ("weight_decay", -1)):
        with pytest.raises(ValueError, match=name):
            Recipe(**{name: value})
    for name, value in (("device", "tpu"), ("precision", "float16")):
        with pytest.raises(ValueError, match=name):
            create_fabric(**{name: value})


def test_streams_of_students_together(monkeypatch, batches, fabric):
    "Each step is queued on its student's stream; the next batch waits for all of them."
    log = []

    @contextmanager
    def on_stream(stream):
        log.append(f"{stream} begins")
        yield
        log.append(f"{stream} queued")

    trainer = "sortkd.train.trainer"
    monkeypatch.setattr(f"{trainer}.on_stream", on_stream)
    monkeypatch.setattr(f"{trainer}.wait_for", lambda stream: log.append(f"wait for {stream}"))
    recipe = replace(RECIPE, batch_size=75)
    learners = [Learner(Student(network(8), CE, recipe), fabric) for _ in "ab"]
    for learner, learner.stream in zip(learners, "ab"):
        learner.start_epoch(1)
    train_epoch(learners, batches, None, 1)
    assert log == 2 * ["a begins", "a queued", "b begins", "b queued", "wait for a", "wait for b"]
