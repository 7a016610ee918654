"The trainer against a loop written by hand in plain PyTorch, to the last bit; resuming; and which run a checkpoint belongs to."
import itertools
import math
import os
import random
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from conftest import QUICK_METHODS
from sortkd.train.augmentation import Batches, draw_views
from sortkd.train.images import load_digits
from sortkd.methods import create_method
from sortkd.train.networks import create_model
from sortkd.train.teacher_logits import CachedTeacherLogits, TeacherLogits
from sortkd.train.checkpoints import Checkpoint, Stopped, fingerprint
from sortkd.train.devices import Ranks, create_fabric
from sortkd.train.batches import Lessons
from sortkd.train.trainer import Learner, Outcome, Recipe, Student, evaluate, teach, train, train_together

# 150 images: two batches of 64 and one of 22. The learning rate falls after epochs 2 and 3.
RECIPE = Recipe(epochs=4, batch_size=64, lr=0.08, momentum=0.9, weight_decay=0.05, milestones=(2, 3), lr_decay=0.1)
LEARNING_RATES = [0.08, 0.08, 0.08 * 0.1, 0.08 * 0.1**2]


@pytest.fixture(scope="module")
def batches():
    return Batches(load_digits().subset(train_size=150, test_size=120))


@pytest.fixture(scope="module")
def fabric():
    return create_fabric("cpu", "float32")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("resnet8", 10).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def teacher():
    "Right on some images, wrong on others."
    return network(7).eval().requires_grad_(False)


def images_of(batches, views):
    "The views as a float tensor (N, 3, H, W) in channels-last memory, image by image."
    data, size, images = batches.data, batches.data.image_size, []
    for index, top, left, flip in zip(*(each.tolist() for each in views)):
        padded = F.pad(data.train_images[index].permute(2, 0, 1), [data.pad] * 4)
        view = padded[:, top : top + size, left : left + size]
        images.append(view.flip(2) if flip else view)
    return normalized(data, torch.stack(images))


def normalized(data, images):
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (data.mean, data.std))
    scale, shift = (1 / (255 * std)).float(), (-mean / std).float()
    return torch.addcmul(shift, images.float(), scale).contiguous(memory_format=torch.channels_last)


def train_by_hand(student, batches, recipe=RECIPE, learning_rates=LEARNING_RATES, seed=0, method=None, teacher=None):
    "Weights after each epoch and the curve, with nothing but a loss and SGD."
    data, curve, weights = batches.data, [], []
    groups = [{"params": list(student.parameters()), "weight_decay": recipe.weight_decay}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, fused=True)
    for epoch, lr in enumerate(learning_rates, 1):
        optimizer.param_groups[0]["lr"] = lr
        views = draw_views(150, data.pad, data.flip, seed, epoch)
        targets, total, hits, wrong, changed = data.train_targets[views.index], 0.0, 0, 0, 0
        for start in range(0, 150, recipe.batch_size):
            stop = min(start + recipe.batch_size, 150)
            images, target = images_of(batches, views.part(start, stop)), targets[start:stop]
            logits = student.train()(images)
            if teacher is None:
                loss = F.cross_entropy(logits, target)
            else:
                with torch.no_grad():
                    full = torch.cat([images, images[:1].expand(-len(images) % 32, -1, -1, -1)])  # the same last bits
                    teacher_logits = teacher(full.contiguous(memory_format=torch.channels_last))[: len(images)]
                repaired = method.repair_logits(teacher_logits, target)
                loss = method.loss(logits, repaired, target, epoch)
                wrong += (teacher_logits.argmax(1) != target).sum().item()
                changed += (repaired != teacher_logits).any(1).sum().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += (loss.detach() * len(target)).item()
            hits += (logits.argmax(1) == target).sum().item()
        row = {"epoch": epoch, "lr": lr, "train_loss": total / 150, "train_top1": 100 * hits / 150}
        row |= {} if teacher is None else {"teacher_wrong_rows": wrong, "changed_rows": changed}
        with torch.no_grad():
            logits = student.eval()(normalized(data, data.test_images.permute(0, 3, 1, 2)))
        row["test_loss"] = F.cross_entropy(logits, data.test_targets, reduction="sum").item() / 120
        row["test_top1"] = 100 * (logits.argmax(1) == data.test_targets).sum().item() / 120
        curve.append(row)
        weights.append({name: value.clone() for name, value in student.state_dict().items()})
    return weights, curve


def without_time(curve):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in curve]


def assert_same_weights(ours, expected):
    assert ours.keys() == expected.keys()
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name


def test_training_is_sgd_on_the_cross_entropy(batches, fabric):
    "Momentum, weight decay on all parameters, the schedule, the metrics, last and best weights."
    weights, curve = train_by_hand(network(8), batches)
    outcome = train(network(8), batches, create_method("ce"), RECIPE, fabric)
    assert without_time(outcome.curve) == curve
    assert_same_weights(outcome.last_weights, weights[-1])
    best = max(range(4), key=lambda epoch: curve[epoch]["test_top1"])
    assert best < 3, "choose another seed: the best epoch must differ from the last"
    assert outcome.best["epoch"] == best + 1 and outcome.last["epoch"] == 4
    assert_same_weights(outcome.best_weights, weights[best])


def test_the_best_epoch_is_the_first_of_equals():
    curve = [{"epoch": epoch, "test_top1": top1} for epoch, top1 in enumerate((50.0, 60.0, 55.0, 60.0), 1)]
    assert Outcome(curve).best == curve[1] and Outcome(curve).last == curve[3]


@pytest.mark.parametrize("name", ["kd", "kd+sort", "dkd+sort"])
def test_distillation_is_sgd_on_the_method_s_loss(batches, fabric, teacher, name):
    "The teacher sees the same views in evaluation mode, and its logits are repaired row by row."
    method = create_method(name)
    weights, curve = train_by_hand(network(1), batches, method=method, teacher=teacher, seed=3)
    outcome = train(network(1), batches, method, RECIPE, fabric, teacher=teacher, seed=3)
    assert without_time(outcome.curve) == curve
    assert_same_weights(outcome.last_weights, weights[-1])
    assert all(0 < row["teacher_wrong_rows"] < 150 for row in curve)
    assert all(row["changed_rows"] == (row["teacher_wrong_rows"] if "sort" in name else 0) for row in curve)


def test_more_steps_than_are_repaired_at_once(batches, fabric, teacher):
    "38 steps, the last of two images."
    recipe, method = replace(RECIPE, epochs=1, batch_size=4, lr=0.01), create_method("kd+sort")
    weights, curve = train_by_hand(network(1), batches, recipe, [0.01], method=method, teacher=teacher)
    outcome = train(network(1), batches, method, recipe, fabric, teacher=teacher)
    assert without_time(outcome.curve) == curve
    assert_same_weights(outcome.last_weights, weights[-1])


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_uses_running_statistics_and_leaves_the_mode(batches, fabric, training):
    model = network(1).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = evaluate(model, batches, fabric)
    assert model.training is training
    assert_same_weights(model.state_dict(), before)
    with torch.no_grad():
        logits = model.eval()(normalized(batches.data, batches.data.test_images.permute(0, 3, 1, 2)))
    assert found.loss == F.cross_entropy(logits, batches.data.test_targets, reduction="sum").item() / 120
    assert found.top1 == 100 * (logits.argmax(1) == batches.data.test_targets).sum().item() / 120 and found.images == 120


def test_evaluation_adds_up_all_batches(fabric):
    "More images than a batch of the evaluation holds."
    batches, model = Batches(load_digits().subset(train_size=10, test_size=330)), network(1)
    found = evaluate(model, batches, fabric)
    with torch.no_grad():
        logits = model.eval()(normalized(batches.data, batches.data.test_images.permute(0, 3, 1, 2)))
    assert found.top1 == 100 * (logits.argmax(1) == batches.data.test_targets).sum().item() / 330
    assert found.loss == pytest.approx(F.cross_entropy(logits, batches.data.test_targets).item(), rel=1e-6)


def test_every_epoch_and_seed_has_random_numbers_of_its_own(batches, fabric):
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.drawn, self.weight = [], nn.Parameter(torch.zeros(3, 10))

        def forward(self, images):
            if self.training:
                self.drawn.append(torch.rand(()).item())
            return images.mean((2, 3)) @ self.weight

    drawn = []
    for seed in (0, 1):
        model = Noise()
        train(model, batches, create_method("ce"), replace(RECIPE, epochs=2), fabric, seed=seed)
        drawn += model.drawn
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 3  # three steps an epoch


def test_dropout_is_seeded_by_the_epoch(batches, fabric):
    "The caller's generator neither matters nor moves."

    def run(state):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 10))
        nn.init.constant_(model[2].weight, 0.01)
        nn.init.zeros_(model[2].bias)
        torch.manual_seed(state)
        outcome = train(model, batches, create_method("ce"), replace(RECIPE, epochs=2, lr=0.01), fabric, seed=4)
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(state).get_state())
        return outcome

    one, other = run(0), run(1)
    assert without_time(one.curve) == without_time(other.curve)
    assert_same_weights(one.last_weights, other.last_weights)


def test_students_taught_together_learn_what_each_learns_alone(batches, fabric, teacher):
    "To the bit: with dropout, strong views and a learned temperature, fewer epochs, another seed; and one whose loss explodes."

    def students():
        def model():
            torch.manual_seed(2)
            return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 10))

        recipe, fewer = replace(RECIPE, epochs=3, lr=0.005), replace(RECIPE, epochs=2, lr=0.005)
        explodes = Student(model(), create_method("ce"), replace(recipe, lr=1e30))
        return [Student(model(), create_method("kd+sort"), recipe), explodes, Student(model(), create_method("mlkd+sort"), fewer),
                Student(model(), create_method("ctkd"), recipe)]

    seeds = [5, 5, 6, 5]
    outcomes = train_together(students(), batches, fabric, teacher=teacher, seed=seeds)
    assert [isinstance(outcome, FloatingPointError) for outcome in outcomes] == [False, True, False, False]
    for number in (0, 2, 3):
        student = students()[number]
        alone = train(student.model, batches, student.method, student.recipe, fabric, teacher=teacher, seed=seeds[number])
        assert without_time(outcomes[number].curve) == without_time(alone.curve)
        assert_same_weights(outcomes[number].last_weights, alone.last_weights)
        assert_same_weights(outcomes[number].best_weights, alone.best_weights)
    with pytest.raises(ValueError, match=r"one batch size, but they have \[32, 64\]"):
        one, other = students()[::3]
        train_together([one, replace(other, recipe=replace(RECIPE, batch_size=32))], batches, fabric, teacher=teacher)


def test_weights_of_the_best_epoch_are_kept_if_asked(batches, fabric, tmp_path):
    "A checkpoint without them is smaller; the run is the same."
    kept, plain = (train(network(8), batches, create_method("ce"), RECIPE, fabric, checkpoint=tmp_path / str(keep), keep_best=keep)
                   for keep in (True, False))
    assert without_time(kept.curve) == without_time(plain.curve) and not plain.best_weights and not plain.captured
    assert_same_weights(kept.last_weights, plain.last_weights)
    assert (tmp_path / "False").stat().st_size < 0.75 * (tmp_path / "True").stat().st_size


def test_no_step_on_a_gpu_asks_for_a_value():
    "Which could not be captured: on a device of which PyTorch knows shapes alone, such a question is an error."
    def loss_of(name):
        method, (student, teacher, strong, strong_teacher) = create_method(name), torch.empty(4, 64, 100)
        repaired = method.repair_logits(teacher, target) if method.uses_teacher else None
        both = (strong, method.repair_logits(strong_teacher, target)) if method.strong_views else None
        return method.loss(student, repaired, target, 100, both, method.create_temperature())

    with FakeTensorMode(), torch.device("cuda"):
        target = torch.empty(64, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            target.sum().item()
        assert {loss_of(name).device.type for name in QUICK_METHODS} == {"cuda"}
        for name in ("resnet8x4", "wrn_16_2", "vgg8", "ShuffleV1", "ShuffleV2", "MobileNetV2"):
            assert create_model(name, 100)(torch.empty(64, 3, 32, 32)).shape == (64, 100)


def test_streams_of_students_taught_together(monkeypatch, batches, fabric):
    "Each step is queued on its student's stream, and no lesson is made before all students have had the one before."
    log, learn = [], Learner.learn

    @contextmanager
    def on_stream(stream):
        log.append(f"{stream} begins")
        yield
        log.append(f"{stream} queued")

    monkeypatch.setattr("sortkd.train.trainer.on_stream", on_stream)
    monkeypatch.setattr("sortkd.train.trainer.wait_for", lambda stream: log.append(f"wait for {stream}"))
    monkeypatch.setattr(Learner, "learn", lambda self, lesson: (log.append(f"step of {self.stream}"), learn(self, lesson)))
    learners = [Learner(Student(network(8), create_method("ce"), RECIPE), fabric, "") for _ in "ab"]
    for learner, learner.stream in zip(learners, "ab"):
        learner.start_epoch(1)
    teach([(Lessons(batches, None, 75, 0, Ranks(fabric)), learners)], 1)
    assert log == 2 * ["a begins", "step of a", "a queued", "b begins", "step of b", "b queued", "wait for a", "wait for b"]


@pytest.mark.cuda
def test_captured_steps_on_a_gpu(monkeypatch, batches):
    "The graph is there. Neither it nor a second student, with another seed and on a stream of its own, changes a bit."
    fabric, on_gpu = create_fabric("cuda", deterministic=True), batches.data.batches("cuda")
    def students(): return [Student(network(8), create_method(name), replace(RECIPE, batch_size=25)) for name in ("ce", "kd+sort")]
    def outcomes(students, seeds): return train_together(students, on_gpu, fabric, teacher=network(7).eval(), seed=seeds)
    captured = outcomes(students(), [1, 2])
    alone = [outcomes([student], [seed])[0] for student, seed in zip(students(), (1, 2))]
    monkeypatch.setattr(Learner, "steps_before_capture", 10**9)
    eager = outcomes(students(), [1, 2])
    assert all(each.captured for each in captured + alone) and not any(each.captured for each in eager)
    for one, two, three in zip(captured, alone, eager):
        assert_same_weights(one.last_weights, two.last_weights)
        assert_same_weights(one.last_weights, three.last_weights)


def test_strong_views_are_those_of_the_epoch(batches, fabric, teacher):
    data, lessons = batches.data, Lessons(batches, TeacherLogits(teacher, batches, "float32"), 64, 3, Ranks(fabric), strong_views=True)
    for epoch in (1, 2):
        block, = lessons.of_epoch(epoch)
        expected = batches.strong_images(draw_views(150, data.pad, data.flip, 3, epoch).index, 3, epoch, 0)
        for step, (start, stop) in enumerate(block.bounds):
            assert torch.equal(block.strong_images(step), expected[start:stop])
        with torch.no_grad():
            torch.testing.assert_close(block.strong_teacher_logits, teacher(expected), rtol=1e-4, atol=1e-4)


class Unplugged(Exception):
    pass


@pytest.mark.parametrize("name", ["kd+sort", "ctkd"])
def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(batches, fabric, teacher, tmp_path, name):
    "Interrupted after every epoch, once by an exception and then by request; only missing epochs are trained."

    def run(**more):
        rows = []
        more["callbacks"] = [rows.append, *more.get("callbacks", ())]
        try:
            outcome = train(network(1), batches, create_method(name), RECIPE, fabric, teacher=teacher, seed=2, **more)
        except (Unplugged, Stopped) as interruption:
            outcome = interruption
        return outcome, [row["epoch"] for row in rows]

    def unplug(row):
        raise Unplugged

    expected, epochs = run()
    assert epochs == [1, 2, 3, 4]
    checkpoint = tmp_path / "run.pt"
    for epoch, kind, more in ((1, Unplugged, {"callbacks": [unplug]}), (2, Stopped, {"stop": lambda: True}), (3, Unplugged, {"callbacks": [unplug]})):
        interruption, epochs = run(checkpoint=checkpoint, checkpoint_seconds=0, **more)
        assert isinstance(interruption, kind) and epochs == [epoch]
    resumed, epochs = run(checkpoint=checkpoint)
    assert epochs == [4]
    finished, epochs = run(checkpoint=checkpoint)
    assert epochs == []
    for outcome in (resumed, finished):
        assert without_time(outcome.curve) == without_time(expected.curve)
        assert_same_weights(outcome.last_weights, expected.last_weights)
        assert_same_weights(outcome.best_weights, expected.best_weights)
        assert outcome.seconds == pytest.approx(sum(row["seconds"] for row in outcome.curve))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Unplugged])
def test_an_interruption_keeps_the_last_whole_epoch(monkeypatch, batches, fabric, teacher, tmp_path, capsys, error):
    "In the third epoch's second step, of the first of two students or of the second, long before a checkpoint is due."
    def run(steps=math.inf):
        rows, learn, count = [], Learner.learn_beside_others, itertools.count(1)

        def interrupted(learner, lesson):
            if next(count) == steps:
                raise error
            learn(learner, lesson)
        monkeypatch.setattr(Learner, "learn_beside_others", interrupted)
        students = [Student(network(1), create_method(name), RECIPE, tmp_path / name, callbacks=[rows.append]) for name in ("ctkd", "kd+sort")]
        try:
            return train_together(students, batches, fabric, teacher=teacher, progress="two"), [row["epoch"] for row in rows]
        finally:
            monkeypatch.setattr(Learner, "learn_beside_others", learn)

    for steps, said in ((3, "no epoch had been finished"), (2 * 2 * 3 + 4, "all up to epoch 2 is saved")):
        with pytest.raises(error):
            run(steps)
        assert (f"two: stopped; {said}." in capsys.readouterr().out) == (error is not Unplugged)
    resumed, epochs = run()
    assert epochs == [3, 3, 4, 4]
    for name, outcome in zip(("ctkd", "kd+sort"), resumed):
        expected = train(network(1), batches, create_method(name), RECIPE, fabric, teacher=teacher)
        assert without_time(outcome.curve) == without_time(expected.curve)
        assert_same_weights(outcome.last_weights, expected.last_weights)


def test_an_interruption_while_an_interrupted_run_is_saved(monkeypatch, batches, fabric, tmp_path):
    "It ends the run; no half-written file is left."
    def interrupt(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(network(1), batches, create_method("ce"), RECIPE, fabric, checkpoint=tmp_path / "run.pt", callbacks=[interrupt])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("name,handled", [("SIGTERM", False), ("SIGHUP", False), ("SIGTERM", True)])
def test_a_signal_that_ends_the_process_lets_it_save_first(batches, fabric, tmp_path, name, handled):
    "By that signal, as without; where somebody has installed a handler, that one is called."
    number = getattr(signal, name)

    def send(row):
        if row["epoch"] == 2:
            os.kill(os.getpid(), number)
            time.sleep(10)
    child = os.fork()
    if child == 0:
        signal.signal(number, (lambda *_: os._exit(3)) if handled else signal.SIG_DFL)
        train(network(1), batches, create_method("ce"), RECIPE, fabric, checkpoint=tmp_path / "run.pt", callbacks=[send])
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == (3 << 8 if handled else number) and (tmp_path / "run.pt").exists() != handled
    assert handled or len(torch.load(tmp_path / "run.pt", weights_only=True)["curve"]) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_signal_waits_for_what_is_being_saved(batches, fabric, tmp_path):
    "As Jupyter sends SIGTERM some seconds after an interrupt."
    def interrupt(row):
        raise KeyboardInterrupt
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGTERM)
        train(network(1), batches, create_method("ce"), RECIPE, fabric, checkpoint=tmp_path / "run.pt", callbacks=[interrupt])
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    assert len(torch.load(tmp_path / "run.pt", weights_only=True)["curve"]) == 1


def test_a_checkpoint_with_one_bit_changed_is_refused(tmp_path):
    path, state = tmp_path / "run.pt", {"model": network(1).state_dict(), "curve": [{"epoch": 1}]}
    Checkpoint(path, "run").save(state)
    content, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(100):
        place = generator.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :])
        try:
            found = Checkpoint(path, "run").load()
        except ValueError as error:
            refused += 1
            assert f"{path} cannot be read" in str(error) and "delete it" in str(error)
        else:  # in the padding between the weights
            assert found["curve"] == state["curve"]
            assert_same_weights(found["model"], state["model"])
    assert refused > 90


def test_a_checkpoint_belongs_to_one_run(fabric, teacher, tmp_path):
    "Whatever changes the numbers of a run changes its identity, the data included; what identifies it stays as it was."
    data, checkpoint = load_digits().subset(train_size=40, test_size=20), tmp_path / "run.pt"
    batches, recipe, method = Batches(data), Recipe(epochs=1, batch_size=20, milestones=()), create_method("kd")

    def run(model=None, batches=batches, method=method, recipe=recipe, fabric=fabric, teacher=teacher, **more):
        return train(model or network(1), batches, method, recipe, fabric, teacher=teacher, checkpoint=checkpoint, **more)

    first = run()
    # Checkpoints of earlier versions must be found: this expression may not change.
    method_fields = {name: value for name, value in asdict(method).items() if name != "repair_settings"}
    parts = asdict(recipe), method_fields, data.checksum, 0, "ResNet", "float32", "computed", ""
    assert torch.load(checkpoint, weights_only=True)["run"] == fingerprint(*parts)
    assert without_time(run().curve) == without_time(first.curve)  # read, not trained

    images = data.train_images.clone()
    images[0, 0, 0, 0] ^= 1
    content = checkpoint.read_bytes()
    for other in (
        {"batches": Batches(replace(data, train_images=images))},
        {"batches": Batches(load_digits().subset(train_size=41, test_size=20))},
        {"method": create_method("kd+sort")},
        {"method": create_method("kd", kd_weight=0.5)},
        {"recipe": replace(recipe, lr=0.04)},
        {"seed": 1},
        {"model": create_model("vgg8", 10)},
        {"fabric": create_fabric("cpu", "bfloat16")},
        {"teacher": CachedTeacherLogits(teacher, batches, tmp_path / "kept")},
        {"context": "another teacher"},
    ):
        with pytest.raises(ValueError, match="belongs to a run with other settings, data, teacher or seed"):
            run(**other)
    assert checkpoint.read_bytes() == content


def test_refusals(batches, fabric):
    with pytest.raises(ValueError, match="method 'kd' .*teacher is None"):
        train(network(1), batches, create_method("kd"), RECIPE, fabric)
    with pytest.raises(FloatingPointError, match="loss of ce is (nan|inf) in epoch 1; lower the learning rate"):
        train(network(1), batches, create_method("ce"), replace(RECIPE, lr=1e30), fabric)
    for wrong in ({"epochs": 0}, {"epochs": True}, {"batch_size": 1.5}, {"lr": float("nan")}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Recipe(**wrong)
    for wrong in ({"device": "tpu"}, {"precision": "float16"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            create_fabric(**wrong)


def test_the_learning_rate_falls_after_each_milestone():
    recipe = Recipe()
    for epoch, lr in ((1, 0.05), (150, 0.05), (151, 0.005), (180, 0.005), (181, 0.0005), (210, 0.0005), (211, 0.00005), (240, 0.00005)):
        assert recipe.lr_in(epoch) == pytest.approx(lr, rel=1e-12), epoch
    assert recipe.shortened(24) == replace(recipe, epochs=24, milestones=(15, 18, 21))
    assert recipe.shortened(5).milestones == (3, 4, 4)  # of 3.125, 3.75 and 4.375
