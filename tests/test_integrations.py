"Sorting inside the training loops of other libraries: each trains as a plain loop written by hand does."

import copy
import io
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY_METHOD
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sortkd import sort_logits, swap_logits
from sortkd.distillation import DistillationLoss
from sortkd.loops.integrations import DistillationTrainerMixin, FrozenTeacher, SortedKDLoss
from sortkd.losses import dist_loss, dkd_loss, kd_loss
from sortkd.methods import create_method

CLASSES, EPOCHS, LR, BATCH = 5, 2, 0.05, 16


class Network(nn.Module):
    "Small, with batch normalisation, whose mode shows in its logits; takes `images` or `pixel_values`."

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.hidden, self.classifier = nn.BatchNorm1d(12), nn.Linear(12, 16), nn.Linear(16, CLASSES)

    def forward(self, pixel_values):
        return 3 * self.classifier(torch.tanh(self.hidden(self.norm(pixel_values.flatten(1)))))


class TokenNetwork(nn.Module):
    "Logits `(B, T, 7)` of tokens `(B, T)`, in double precision."

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(7, 8, dtype=torch.float64), nn.Linear(8, 7, dtype=torch.float64)

    def forward(self, input_ids):
        return 3 * self.head(torch.tanh(self.embedding(input_ids)))


@pytest.fixture
def tokens_to_learn():
    "Four examples of eight tokens, of which 8, 6, 1 and 1 count; of the first, the one at the start as well."
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(7, (2, 4, 8), generator=generator).unbind()
    labels[1, :2] = labels[2:, 1:] = -100
    labels[2:] = labels[2:].flip(1)
    return [{"input_ids": one, "labels": other} for one, other in zip(tokens, labels)]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(64, 3, 2, 2, generator=generator) + 0.5, torch.randint(CLASSES, (64,), generator=generator)
    )


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 30, CLASSES, generator=generator).unbind()
    return student, 3 * teacher, torch.randint(CLASSES, (30,), generator=generator)


def train_by_hand(data, repair=sort_logits, student=None):
    "KD with a repair at temperature 4, written out without anything from `integrations`."
    teacher, student = Network(0).eval(), Network(1) if student is None else student
    optimizer = torch.optim.SGD(student.parameters(), lr=LR)
    for _ in range(EPOCHS):
        for images, target in DataLoader(data, BATCH):
            with torch.no_grad():
                teacher_logits = repair(teacher(images), target)
            output = student.train()(pixel_values=images)
            output = output if isinstance(output, torch.Tensor) else output.logits
            loss = 0.1 * F.cross_entropy(output, target) + 0.9 * kd_loss(output, teacher_logits, 4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student


def largest_difference(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((one - other).abs().max().item() for one, other in pairs)


def assert_trained_like(network, data, **options):
    "The weights of the loop by hand, and not those of the same loop without sorting."
    assert largest_difference(network, train_by_hand(data, **copy.deepcopy(options))) < 1e-5
    assert largest_difference(network, train_by_hand(data, lambda values, _: values, **copy.deepcopy(options))) > 1e-3


# ---- The loss ----


def test_loss_is_the_method_by_hand(logits):
    student, teacher, target = logits
    cross_entropy, repaired = F.cross_entropy(student, target), sort_logits(teacher, target)
    expected = {
        ("kd+sort", None): 0.1 * cross_entropy + 0.9 * kd_loss(student, repaired, 4.0),
        ("kd", None): 0.1 * cross_entropy + 0.9 * kd_loss(student, teacher, 4.0),
        ("kd+swap", None): 0.1 * cross_entropy + 0.9 * kd_loss(student, swap_logits(teacher, target), 4.0),
        ("dist+sort", 3): cross_entropy + dist_loss(student, repaired),
        ("dkd+sort", 5): cross_entropy + 5 / 20 * dkd_loss(student, repaired, target),
        ("dkd+sort", 20): cross_entropy + dkd_loss(student, repaired, target),
        ("ce", None): cross_entropy,
    }
    for (method, epoch), value in expected.items():
        torch.testing.assert_close(DistillationLoss(method)(student, teacher, target, epoch), value)
    assert len({round(value.item(), 5) for value in expected.values()}) == len(expected)


def test_loss_takes_settings_and_counts_what_is_wrong(logits):
    student, teacher, target = logits
    loss = DistillationLoss("kd+sort", temperature=2.0, ce_weight=0.0, kd_weight=1.0)
    torch.testing.assert_close(loss(student, teacher, target), kd_loss(student, sort_logits(teacher, target), 2.0))
    assert torch.equal(loss.teacher_wrong, teacher.argmax(1) != target)
    assert 0 < loss.teacher_wrong.sum() < len(target)
    assert loss(student, sort_logits(teacher, target), target).isfinite() and not loss.teacher_wrong.any()
    assert repr(loss) == "DistillationLoss('kd+sort')"


def test_cross_entropy_needs_no_teacher(logits):
    loss = DistillationLoss("ce")
    torch.testing.assert_close(loss(logits[0], None, logits[2]), F.cross_entropy(logits[0], logits[2]))
    assert loss.teacher_wrong is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_is_computed(logits, dtype):
    student, teacher, target = (each.to(dtype) if each.is_floating_point() else each for each in logits)
    loss = DistillationLoss("kd+sort")(student.requires_grad_(), teacher, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, DistillationLoss("kd+sort")(student.float(), teacher.float(), target), rtol=0, atol=0
    )
    wide = DistillationLoss("kd+sort")(*(each.double() for each in logits[:2]), target)
    assert wide.dtype == torch.float64


def test_gradients_reach_the_student_and_a_learned_temperature_only(logits):
    student, teacher, target = logits
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = DistillationLoss("ctkd+sort")
    loss(student, teacher, target, epoch=5).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    (raw,) = loss.parameters()
    assert raw.grad.abs().sum() > 0
    assert not list(DistillationLoss("kd+sort").parameters())


@pytest.mark.parametrize(
    ("method", "changes"), [("dkd+sort", {}), ("lskd_dkd", {}), ("ctkd", {}), ("kd", {"warmup_epochs": 3})]
)
def test_a_method_that_changes_with_the_epoch_must_know_it(logits, method, changes):
    with pytest.raises(ValueError, match=r"changes from epoch to epoch"):
        DistillationLoss(method, **changes)(*logits)
    first, second = (DistillationLoss(method, **changes)(*logits, epoch=epoch) for epoch in (1, 2))
    assert method == "ctkd" or first != second  # there the gradient changes, not the value


def test_a_warmup_of_nothing_needs_no_epoch(logits):
    student, teacher, target = logits
    expected = F.cross_entropy(student, target) + dkd_loss(student, sort_logits(teacher, target), target)
    torch.testing.assert_close(DistillationLoss("dkd+sort", warmup_epochs=0)(*logits), expected)


@pytest.mark.parametrize("epoch", [0, -1])
def test_epochs_count_from_one(logits, epoch):
    with pytest.raises(ValueError, match="counted from 1"):
        DistillationLoss("kd+sort")(*logits, epoch=epoch)


@pytest.mark.parametrize("method", ["mlkd", "lskd_mlkd+sort", "sld"])
def test_methods_with_strong_views_are_refused(method):
    with pytest.raises(ValueError, match="strongly augmented views"):
        DistillationLoss(method)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda student, teacher, target: ({"logits": student}, teacher, target), TypeError, "of type dict"),
        (lambda student, teacher, target: (student.long(), teacher, target), TypeError, "int64"),
        (lambda student, teacher, target: (student, None, target), TypeError, "teacher_logits.*NoneType"),
        (lambda student, teacher, target: (student[None], teacher[None], target), ValueError, "target has shape"),
        (lambda student, teacher, target: (student, teacher[:, :4], target), ValueError, "the same classes"),
        (lambda student, teacher, target: (student, teacher[:7], target), ValueError, "one shape"),
        (lambda student, teacher, target: (student, teacher, target[:7]), ValueError, "target has shape"),
        (
            lambda student, teacher, target: (student, teacher, F.one_hot(target, CLASSES).float()),
            TypeError,
            "class indices",
        ),
        (lambda student, teacher, target: (student, teacher, target - 100), ValueError, "target holds"),
    ],
)
def test_bad_input_is_named(logits, change, error, message):
    for method in ("kd", "kd+sort"):
        with pytest.raises(error, match=message):
            DistillationLoss(method)(*change(*logits))


def test_unknown_methods_and_settings_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'kd\\+sort'"):
        DistillationLoss("kd+sorted")
    with pytest.raises(ValueError, match="no setting beta"):
        DistillationLoss("kd+sort", beta=2.0)


# ---- Tokens and dense maps ----

METHODS = [each for each in EVERY_METHOD if not create_method(each if isinstance(each, str) else each.values[0]).strong_views]


@pytest.fixture
def tokens():
    "Logits `(B, T, V)` of student and teacher; a prompt and padding, whose logits are anything at all."
    generator = torch.Generator().manual_seed(2)
    student, teacher = 2 * torch.randn(2, 4, 6, 7, generator=generator)
    target = torch.randint(7, (4, 6), generator=generator)
    target[0, :3] = target[2, 5] = -100
    student[2, 5], teacher[2, 5], teacher[0, 0] = -torch.inf, torch.nan, torch.inf
    return student, teacher, target


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_do_not_count_are_as_if_they_were_absent(tokens, method):
    student, teacher, target = tokens
    counts, loss = target != -100, DistillationLoss(method)
    student.requires_grad_()
    value = loss(student, teacher, target, 3)
    (gradient,) = torch.autograd.grad(value, student)
    expected = loss(student[counts], teacher[counts], target[counts], 3)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])
    assert not gradient[~counts].any()
    if loss.method.uses_teacher:
        loss(student, teacher, target, 3)
        assert loss.teacher_wrong.shape == target.shape and not loss.teacher_wrong[~counts].any()
    dense = DistillationLoss(method, dim=1, ignore_index=99)
    maps = (each.movedim(2, 1)[..., None] for each in (student, teacher))
    torch.testing.assert_close(dense(*maps, target.where(counts, 99)[..., None], 3), value)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_all_count_change_no_bit(logits, method):
    student, teacher, target = logits
    by_method = create_method(method)
    repaired = by_method.repair_logits(teacher, target) if by_method.uses_teacher else None
    loss = DistillationLoss(method)
    expected = by_method.loss(student, repaired, target, 3, temperature=loss.temperature)
    assert torch.equal(loss(student, teacher, target, 3), expected)


def test_a_batch_in_which_nothing_counts(tokens):
    student, teacher, target = tokens
    student, target = student.nan_to_num(neginf=0.0).requires_grad_(), torch.full_like(target, -100)
    loss = DistillationLoss("kd+sort")(student, teacher, target)
    loss.backward()
    assert loss == 0 and not student.grad.any()
    with pytest.raises(ValueError, match="at least one row"):  # DIST relates rows, and there are none
        DistillationLoss("dist")(student, teacher, target)


@pytest.fixture
def unequal():
    "Two micro-batches `(2, 8, V)` of which 14 and 2 rows count, in double precision."
    generator = torch.Generator().manual_seed(5)
    student, teacher = 3 * torch.randn(2, 4, 8, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (4, 8), generator=generator)
    target[0, :2] = target[2:, 1:] = -100
    return student, teacher, target


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_unequal_parts_add_up_to_that_of_the_whole(unequal, method):
    "In value and gradient, also of a learned temperature; a method that relates rows has no parts."
    student, teacher, target = unequal
    mean, parts = DistillationLoss(method).double(), [slice(0, 2), slice(2, 4)]
    if method.startswith("dist"):
        with pytest.raises(ValueError, match="relates the rows.*leave out num_items"):
            mean(student, teacher, target, 3, num_items=16)
        with pytest.raises(ValueError, match="leave out reduction='sum'"):
            DistillationLoss(method, reduction="sum")
        return
    learned = list(mean.parameters())

    def gradients(loss):
        return torch.cat([each.flatten().double() for each in torch.autograd.grad(loss, [student, *learned])])

    student.requires_grad_()
    whole = mean(student, teacher, target, 3)
    expected = gradients(whole)
    for count in (16, 16.0, torch.tensor(16)):
        losses = [mean(student[each], teacher[each], target[each], 3, num_items=count) for each in parts]
        torch.testing.assert_close(sum(losses), whole, rtol=1e-9, atol=0)
        torch.testing.assert_close(gradients(sum(losses)), expected, rtol=1e-6, atol=1e-9)
    summed = DistillationLoss(method, reduction="sum")
    torch.testing.assert_close(sum(summed(student[each], teacher[each], target[each], 3) for each in parts), 16 * whole, rtol=1e-6, atol=0)


def test_reductions_and_numbers_that_make_no_sense(logits):
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', but it is 'none'"):
        DistillationLoss(reduction="none")
    for count in (0, -3, float("nan")):
        with pytest.raises(ValueError, match="num_items must be greater than 0"):
            DistillationLoss()(*logits, num_items=count)


@pytest.mark.parametrize("method", ["kd+sort", "dkd+revise", "lskd", "ctkd", "dist+sort"])
def test_autocast_and_compile_change_nothing(tokens, method):
    student, teacher, target = tokens
    loss, relates = DistillationLoss(method), method.startswith("dist")
    expected = loss(student, teacher, target, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher, target, 3), expected)
    torch.compiler.reset()
    student.requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=not relates)(student, teacher, target, 3)
    torch.testing.assert_close(compiled, expected)
    assert torch.autograd.grad(compiled, student)[0].isfinite().all()


# ---- The teacher ----


def test_frozen_teacher_is_no_part_of_what_surrounds_it(data):
    images, network = data.tensors[0], Network(0)
    expected = copy.deepcopy(network).eval()(images)
    whole = nn.ModuleDict({"student": Network(1), "teacher": FrozenTeacher(network)}).train()
    assert torch.equal(whole["teacher"](images), expected) and torch.equal(whole["teacher"](images), expected)
    assert not whole["teacher"](images).requires_grad and not network.training
    assert {name.split(".")[0] for name in whole.state_dict()} == {"student"}
    assert len(list(whole.parameters())) == len(list(Network(1).parameters()))
    whole.load_state_dict(copy.deepcopy(whole.state_dict()), strict=True)
    for parameter in network.parameters():
        assert not parameter.requires_grad


def test_frozen_teacher_follows_moves_and_copies(data):
    teacher = nn.Sequential(FrozenTeacher(Network(0)))
    assert teacher.double()(data.tensors[0].double()).dtype == torch.float64
    assert teacher.to("meta")[0].network.classifier.weight.is_meta
    original = FrozenTeacher(Network(0))
    clone = copy.deepcopy(original)
    assert clone.network is not original.network
    assert torch.equal(clone(data.tensors[0]), original(pixel_values=data.tensors[0]))
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(data.tensors[0]), original(data.tensors[0]))


# ---- A torchvision and a timm network ----


def test_any_two_networks():
    import timm
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES)
    student = timm.create_model("test_vit", img_size=32, num_classes=CLASSES)
    images, target = torch.randn(20, 3, 32, 32), torch.arange(20) % CLASSES
    with torch.no_grad():  # an untrained teacher that tells the images apart: statistics of them, and larger logits
        for _ in range(30):
            network(images)
        network.fc.weight.mul_(50)
    teacher = FrozenTeacher(network)
    optimizer, loss_function = torch.optim.AdamW(student.parameters(), lr=5e-3), DistillationLoss("kd+sort")
    losses = []
    for _ in range(25):
        loss = loss_function(student(images), teacher(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(loss_function.teacher_wrong, teacher(images).argmax(1) != target)
    with torch.no_grad():  # the student has learned the truth, which only the repair tells the teacher
        accuracy = (student(images).argmax(1) == target).float().mean()
    assert accuracy > 0.8
    assert loss_function.teacher_wrong.float().mean() > 0.5


# ---- torchdistill ----

CONFIG = """
sortkd: !import_call {key: 'sortkd.loops.integrations.register_torchdistill'}

num_epochs: 2
train_data_loader:
  dataset_id: 'data'
  sampler:
    class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}
  kwargs: {batch_size: 16}
teacher: {forward_proc: 'forward_batch_only', requires_grad: False}
student: {forward_proc: 'forward_batch_only'}
optimizer: {key: 'SGD', kwargs: {lr: 0.05}}
pre_epoch_process: 'sortkd_pre_epoch'
criterion:
  key: 'WeightedSumLoss'
  kwargs:
    sub_terms:
      distillation:
        criterion: {key: 'SortedKDLoss', kwargs: {method: 'kd+sort'}}
        weight: 1.0
"""


@pytest.fixture
def make_box(tmp_path, data):
    from torchdistill.common.yaml_util import load_yaml_file
    from torchdistill.core.distillation import get_distillation_box

    def make(config=CONFIG, teacher=None):
        path = tmp_path / "config.yaml"
        path.write_text(config)
        teacher = Network(0) if teacher is None else teacher
        return get_distillation_box(
            teacher, Network(1), {"data": data}, load_yaml_file(path), torch.device("cpu"), None, False, 1
        )

    return make


def train_box(box):
    losses = []
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for images, target, supplement in box.train_data_loader:
            loss = box.forward_process(images, target, supplement)
            losses.append(loss.item())
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
    return losses


def test_torchdistill_trains_like_the_loop_by_hand(make_box, data):
    box = make_box()
    assert box.teacher_model.training, "the teacher arrives in training mode"
    train_box(box)
    assert not box.teacher_model.training
    assert_trained_like(box.student_model, data)
    assert largest_difference(box.teacher_model, Network(0)) == 0


def test_torchdistill_first_loss_by_hand(make_box, data):
    images, target = data[:BATCH]
    student, teacher = Network(1)(images), sort_logits(Network(0).eval()(images).detach(), target)
    expected = {
        "kd+sort": 0.1 * F.cross_entropy(student, target) + 0.9 * kd_loss(student, teacher, 4.0),
        "dkd+sort', beta: 2.0, method: 'dkd+sort": F.cross_entropy(student, target)
        + 1 / 20 * dkd_loss(student, teacher, target, beta=2.0),
    }
    for method, value in expected.items():
        box = make_box(CONFIG.replace("kd+sort", method))
        assert train_box(box)[0] == pytest.approx(value.item(), rel=1e-5)


def test_torchdistill_weights_and_places(make_box, data):
    "A term of weight 3 on logits that a hook recorded: before the factor 3 that the networks apply."
    hooks = "forward_hook: {input: [], output: ['classifier']}"
    config = CONFIG.replace("requires_grad: False", f"requires_grad: False, {hooks}")
    config = config.replace("student: {", f"student: {{{hooks}, ").replace("weight: 1.0", "weight: 3.0")
    config = config.replace(
        "'kd+sort'", "'kd+sort', student_module_path: 'classifier', teacher_module_path: 'classifier', ce_weight: 0.0"
    )
    images, target = data[:BATCH]
    student, teacher = Network(1)(images) / 3, Network(0).eval()(images).detach() / 3
    expected = 3 * 0.9 * kd_loss(student, sort_logits(teacher, target), 4.0)
    assert train_box(make_box(config))[0] == pytest.approx(expected.item(), rel=1e-5)


def test_torchdistill_passes_the_epoch_on(make_box, data):
    box = make_box(CONFIG.replace("kd+sort", "dkd+sort"))
    ((criterion, _),) = box.criterion.term_dict.values()
    for epoch in (0, 6):
        box.pre_epoch_process(epoch=epoch)
        assert criterion.epoch == epoch + 1
        images, target = data[:BATCH]
        with torch.no_grad():
            student, teacher = box.student_model(images), box.teacher_model(images)
        value = create_method("dkd+sort").loss(student, sort_logits(teacher, target), target, epoch + 1)
        assert box.forward_process(images, target, {}).item() == pytest.approx(value.item(), rel=1e-5)


def test_torchdistill_says_what_is_missing(make_box, data):
    box = make_box(CONFIG.replace("kd+sort", "dkd+sort").replace("pre_epoch_process: 'sortkd_pre_epoch'", ""))
    box.pre_epoch_process(epoch=0)
    with pytest.raises(ValueError, match="pre_epoch_process: 'sortkd_pre_epoch'"):
        box.forward_process(*data[:BATCH], {})
    with pytest.raises(ValueError, match="Did you mean 'kd\\+sort'"):
        make_box(CONFIG.replace("kd+sort", "kd+sorted"))
    with pytest.raises(ValueError, match="ctkd learns its temperature"):
        SortedKDLoss("ctkd")


def test_torchdistill_accumulates_gradients_of_equal_parts_alone(make_box, data):
    "Which it weighs equally; parts of which different numbers of rows count are refused, a short last batch at once."
    def train(config):
        box = make_box(config.replace("num_epochs: 2", "num_epochs: 1"))
        box.pre_epoch_process(epoch=0)
        box.student_model.eval()  # batch normalisation would tell a batch from its parts
        for images, target, supplement in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(images, target, supplement))
        return box.student_model

    whole = CONFIG.replace("batch_size: 16", "batch_size: 64")
    parts = CONFIG.replace("lr: 0.05}", "lr: 0.05}, grad_accum_step: 4")
    assert largest_difference(train(parts), train(whole)) < 1e-7
    with pytest.raises(ValueError, match="64 rows are no multiple of batch_size 12.*drop_last: True"):
        train(parts.replace("batch_size: 16", "batch_size: 12"))
    train(parts.replace("batch_size: 16", "drop_last: True, batch_size: 12"))
    with pytest.raises(ValueError, match="dist\\+sort relates the rows"):
        train(parts.replace("kd+sort", "dist+sort"))

    data.tensors[1][:14] = -100
    with pytest.raises(ValueError, match="of one micro-batch 2 rows count, of another 16.*reduction: 'sum'"):
        train(parts)
    summed = parts.replace("'kd+sort'", "'kd+sort', reduction: 'sum'").replace("weight: 1.0", f"weight: {4 / 50}")
    assert largest_difference(train(summed), train(whole)) < 1e-7
    assert largest_difference(train(summed), Network(1)) > 1e-3


def test_torchdistill_leaves_a_teacher_that_learns_in_its_mode(make_box):
    box = make_box(CONFIG.replace("requires_grad: False", "requires_grad: True"))
    box.pre_epoch_process(epoch=0)
    assert box.teacher_updatable and box.teacher_model.training


# ---- Lightning ----


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_like_the_loop_by_hand(data, tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.student, self.teacher, self.loss = Network(1), FrozenTeacher(Network(0)), DistillationLoss("kd+sort")

        def training_step(self, batch, batch_index):
            images, target = batch
            loss = self.loss(self.student(images), self.teacher(images), target, self.current_epoch + 1)
            self.log("wrong", self.loss.teacher_wrong.float().mean(), on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    module = Module().train()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(data, BATCH))
    assert_trained_like(module.student, data)
    images, target = data.tensors
    wrong = (Network(0).eval()(images).argmax(1) != target).float().mean().item()
    assert 0 < wrong < 1 and trainer.callback_metrics["wrong"].item() == pytest.approx(wrong)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"student"}
    Module().load_state_dict(saved, strict=True)


@pytest.mark.filterwarnings("ignore")
def test_lightning_takes_a_batch_apart(tmp_path, tokens_to_learn):
    "With optimisation by hand; parts of which 14 and 2 tokens count make the step of the whole."
    import lightning

    class Module(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self, parts):
            super().__init__()
            self.student, self.teacher, self.loss = TokenNetwork(1), FrozenTeacher(TokenNetwork(0)), DistillationLoss("kd+sort")
            self.parts = parts

        def training_step(self, batch, batch_index):
            count = (batch["labels"] != -100).sum()
            for inputs, target in zip(batch["input_ids"].chunk(self.parts), batch["labels"].chunk(self.parts)):
                loss = self.loss(self.student(inputs), self.teacher(inputs), target, num_items=count)
                self.manual_backward(loss)
            self.optimizers().step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    whole, parts = Module(1), Module(2)
    for module in (whole, parts):
        trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
                                    enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
        trainer.fit(module, DataLoader(tokens_to_learn, 4))
    assert largest_difference(whole.student, TokenNetwork(1)) > 1e-2
    assert largest_difference(whole.student, parts.student) < 1e-12


# ---- Hugging Face ----


@pytest.fixture
def quick_hub(monkeypatch):
    "Nothing is downloaded, and no memory collected after each training, which takes longer than these."
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("gc.collect", lambda *_: 0)


@pytest.fixture
def make_trainer(data, tmp_path, quick_hub):
    import transformers

    class DistillationTrainer(DistillationTrainerMixin, transformers.Trainer):
        pass

    def make(
        model,
        distillation_loss=None,
        teacher="the usual",
        train=True,
        batch_size=BATCH,
        compute_loss_func=None,
        **settings,
    ):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=LR,
            max_grad_norm=0.0,
            num_train_epochs=EPOCHS,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=batch_size,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        examples = [{"pixel_values": images, "labels": int(target)} for images, target in data]
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            eval_dataset=examples,
            compute_loss_func=compute_loss_func,
            teacher=Network(0) if teacher == "the usual" else teacher,
            distillation_loss=DistillationLoss("kd+sort") if distillation_loss is None else distillation_loss,
        )
        if train:
            trainer.train()
        return trainer

    return make


@pytest.fixture
def vit():
    "A network of the library, whose forward takes any keyword: it announces that it scales its loss itself."
    import transformers

    torch.manual_seed(2)
    config = transformers.ViTConfig(
        image_size=2,
        patch_size=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def test_trainer_trains_like_the_loop_by_hand(make_trainer, vit, data):
    assert_trained_like(make_trainer(copy.deepcopy(vit)).model, data, student=vit)


def test_trainer_takes_networks_that_return_logits_alone(make_trainer, data):
    trainer = make_trainer(Network(1), remove_unused_columns=False, label_names=["labels"])
    assert_trained_like(trainer.model, data)
    images, target = data.tensors
    with torch.no_grad():
        expected = trainer.model.eval()(images)
    predicted = trainer.predict(trainer.eval_dataset)
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), expected)
    assert predicted.metrics["test_loss"] == pytest.approx(F.cross_entropy(expected, target).item(), rel=1e-4)


class TokenNetworkWithMore(TokenNetwork):
    "Takes any keyword, by which the Trainer believes that it scales its loss itself."

    def forward(self, input_ids, **named):
        return super().forward(input_ids)


@pytest.fixture
def train_on_tokens(tmp_path, tokens_to_learn, quick_hub):
    "The student after one step of SGD at rate 1; `settings` of the Trainer."
    import transformers

    class DistillationTrainer(DistillationTrainerMixin, transformers.Trainer):
        pass

    def train(student, loss, batch_size, causal_lm=False, collate=None, **settings):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0,
            max_grad_norm=0.0, max_steps=1, train_sampling_strategy="sequential", per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size, dataloader_pin_memory=False, logging_strategy="no",
            save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
            **settings)
        trainer = DistillationTrainer(
            model=student, args=arguments, train_dataset=tokens_to_learn, teacher=TokenNetwork(0), distillation_loss=loss,
            causal_lm=causal_lm, data_collator=collate)
        trainer.train()
        return student

    return train


def with_shifted_labels(examples):
    "As collators of packed sequences do: the last token of one sequence does not predict the first of the next."
    batch = torch.utils.data.default_collate(examples)
    batch["shift_labels"] = batch["labels"].roll(-1, 1)
    batch["shift_labels"][:, 3::4] = -100
    return batch


@pytest.mark.parametrize("network", [TokenNetwork, TokenNetworkWithMore])
@pytest.mark.parametrize(
    ("causal_lm", "collate", "options"),
    [(False, None, {}), (True, None, {}), (True, with_shifted_labels, {}), (False, None, {"ignore_index": 3}),
     (True, None, {"reduction": "sum"})],
)
def test_trainer_accumulates_the_gradient_of_the_whole_batch(
    train_on_tokens, tokens_to_learn, network, causal_lm, collate, options
):
    for example in tokens_to_learn if "ignore_index" in options else ():
        example["labels"][example["labels"] == -100] = 3
    loss = DistillationLoss("kd+sort", **options)
    by_hand, batch = TokenNetwork(1), (collate or torch.utils.data.default_collate)(tokens_to_learn)
    with torch.no_grad():
        teacher_logits = TokenNetwork(0)(batch["input_ids"])
    student_logits, target = by_hand(batch["input_ids"]), batch["labels"]
    if causal_lm:
        target = batch.get("shift_labels", target.roll(-1, 1))[:, :-1]
        student_logits, teacher_logits = student_logits[:, :-1], teacher_logits[:, :-1]
    DistillationLoss("kd+sort", **options)(student_logits, teacher_logits, target).backward()
    torch.optim.SGD(by_hand.parameters(), lr=1.0).step()
    for batch_size in (4, 2, 1):
        trained = train_on_tokens(network(1), loss, batch_size, causal_lm, collate)
        for one, other in zip(trained.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert largest_difference(by_hand, TokenNetwork(1)) > 1e-2


def test_trainer_passes_the_epoch_on(make_trainer, vit):
    epochs = []

    class Listening(DistillationLoss):
        def forward(self, student_logits, teacher_logits, target, epoch=None):
            epochs.append(epoch)
            return super().forward(student_logits, teacher_logits, target, epoch)

    make_trainer(vit, Listening("dkd+sort"))
    assert epochs == [1] * 4 + [2] * 4


def test_trainer_evaluates_the_model_alone(make_trainer, vit, data):
    trainer = make_trainer(vit)
    trainer.teacher = None
    images, target = data.tensors
    measured = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        expected = F.cross_entropy(trainer.model.eval()(pixel_values=images).logits, target).item()
    assert measured == pytest.approx(expected, rel=1e-4)


def test_trainer_without_a_teacher_trains_with_cross_entropy(make_trainer, vit, data):
    trainer = make_trainer(copy.deepcopy(vit), DistillationLoss("ce"), teacher=None)
    optimizer = torch.optim.SGD(vit.parameters(), lr=LR)
    for _ in range(EPOCHS):
        for images, target in DataLoader(data, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(vit.train()(pixel_values=images).logits, target).backward()
            optimizer.step()
    assert largest_difference(trainer.model, vit) < 1e-5


def test_trainer_shifts_the_labels_of_a_language_model(make_trainer, vit):
    "As the library's own loss does, in evaluation and in training; and it asks, where it cannot know."
    import transformers

    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model, teacher = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config).eval()
    batch = {"input_ids": torch.randint(11, (3, 8)), "labels": torch.randint(11, (3, 8))}
    batch["labels"][:, :4] = -100
    own = model.eval()(**batch).loss
    trainer = make_trainer(model, train=False, teacher=teacher)
    with pytest.raises(ValueError, match="need causal_lm"):
        trainer.compute_loss(model, batch)
    trainer.causal_lm = True
    torch.testing.assert_close(trainer.compute_loss(model, batch), own)
    with torch.no_grad():
        student_logits, teacher_logits = (each(batch["input_ids"]).logits[:, 3:-1].flatten(0, 1) for each in (model, teacher))
    target = batch["labels"][:, 4:].flatten()
    expected = 0.1 * own + 0.9 * kd_loss(student_logits, sort_logits(teacher_logits, target), 4.0)
    torch.testing.assert_close(trainer.compute_loss(model.train(), batch), expected)


def test_trainer_refuses_what_would_have_no_effect(make_trainer, vit):
    for options, message in (
        ({"distillation_loss": DistillationLoss("ctkd")}, "learns its temperature"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"compute_loss_func": lambda outputs, labels, **_: 0.0}, "compute_loss_func"),
        ({"distillation_loss": DistillationLoss("dist"), "gradient_accumulation_steps": 2}, "dist relates the rows"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(vit, train=False, **options)
    trainer = make_trainer(vit, train=False)
    split = types.SimpleNamespace(cp_enabled=True, sp_enabled=False)
    trainer.accelerator = types.SimpleNamespace(parallelism_config=split)
    with pytest.raises(ValueError, match="leave out context and sequence parallelism"):
        trainer._refuse_settings()
    for mode in (True, False):
        with pytest.raises(ValueError, match="'labels', but it holds pixel_values.*remove_unused_columns=False"):
            trainer.compute_loss(vit.train(mode), {"pixel_values": torch.zeros(2, 3, 2, 2)})


def _train_in_process(rank, processes, store, weights):
    "One of the processes of `test_processes_make_the_step_of_one`, each with its share of eight examples."
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store)}
    import transformers

    class DistillationTrainer(DistillationTrainerMixin, transformers.Trainer):
        pass

    tokens, labels = torch.randint(7, (2, 8, 8), generator=torch.Generator().manual_seed(3)).unbind()
    for row, length in enumerate((8, 6, 1, 1, 3, 2, 8, 1)):
        labels[row, length:] = -100
    arguments = transformers.TrainingArguments(
        output_dir=str(weights.parent), use_cpu=True, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0,
        max_grad_norm=0.0, max_steps=1, train_sampling_strategy="sequential", per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // processes, dataloader_pin_memory=False, save_strategy="no", report_to="none",
        disable_tqdm=True, remove_unused_columns=False, label_names=["labels"])
    student = TokenNetwork(1)
    DistillationTrainer(
        model=student, args=arguments, train_dataset=[{"input_ids": one, "labels": other} for one, other in zip(tokens, labels)],
        teacher=TokenNetwork(0), distillation_loss=DistillationLoss("kd+sort"), causal_lm=False).train()
    if rank == 0:
        torch.save(student.state_dict(), weights)


@pytest.mark.slow
def test_processes_make_the_step_of_one(tmp_path):
    import socket

    for processes in (1, 2):
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_train_in_process, (processes, port, tmp_path / str(processes)), processes)
    one, two = (torch.load(tmp_path / name) for name in "12")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-12)


@pytest.fixture
def pair_of_berts():
    "A DistilBERT, which knows no token types, and a BERT, which needs them; and examples with a column for neither."
    import datasets
    import transformers

    torch.manual_seed(4)
    small = {"vocab_size": 11, "num_labels": CLASSES, "max_position_embeddings": 8, "initializer_range": 0.5}
    distilbert = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(
        dim=8, hidden_dim=8, n_layers=1, n_heads=2, dropout=0, attention_dropout=0, seq_classif_dropout=0, **small))
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0, **small))
    columns = {"input_ids": torch.randint(11, (8, 6)), "attention_mask": torch.ones(8, 6).long(),
               "token_type_ids": torch.arange(6).gt(2).long().repeat(8, 1), "labels": torch.randint(CLASSES, (8,))}
    return distilbert, bert, columns, datasets.Dataset.from_dict(
        {name: value.tolist() for name, value in columns.items()} | {"text": ["a pair; of texts"] * 8})


@pytest.mark.parametrize("with_types", ["student", "teacher"])
def test_each_network_has_the_columns_that_it_names(make_trainer, pair_of_berts, with_types):
    distilbert, bert, columns, examples = pair_of_berts
    student, teacher = (bert, distilbert) if with_types == "student" else (distilbert, bert)
    target, parts = columns.pop("labels"), {}
    parts[bert], parts[distilbert] = columns, {name: columns[name] for name in ("input_ids", "attention_mask")}
    by_hand, seen = copy.deepcopy(student).train(), []
    with torch.no_grad():
        teacher_logits = teacher.eval()(**parts[teacher]).logits
        untyped = bert.eval()(**parts[distilbert]).logits
        assert (bert(**columns).logits - untyped).abs().max() > 1e-2
    DistillationLoss("kd+sort")(by_hand(**parts[student]).logits, teacher_logits, target).backward()
    torch.optim.SGD(by_hand.parameters(), lr=LR).step()
    trainer = make_trainer(student, teacher=teacher, train=False, max_steps=1)
    student.register_forward_pre_hook(lambda _, __, named: seen.append(set(named) - {"return_dict"}), with_kwargs=True)
    trainer.train_dataset = trainer.eval_dataset = examples
    trainer.train()
    assert largest_difference(student, by_hand) < 1e-6
    trainer.predict(examples.remove_columns("labels"))
    assert all(each == set(parts[student]) for each in seen) and len(seen) == 2


class Anything(Network):
    def forward(self, **inputs):
        return super().forward(**inputs)


def test_trainer_refuses_a_teacher_that_names_nothing(make_trainer, vit, data):
    with pytest.raises(ValueError, match="names none of its arguments.*remove_unused_columns=False"):
        make_trainer(vit, teacher=Anything(0))
    student = copy.deepcopy(vit)
    make_trainer(student, teacher=Anything(0), remove_unused_columns=False)
    assert_trained_like(student, data, student=vit)


def test_trainer_needs_decoder_inputs(make_trainer):
    "Without labels, BART would make them from the encoder's, and compare these logits with other labels."
    import transformers

    config = transformers.BartConfig(vocab_size=11, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                     decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=8)
    student, teacher = (transformers.BartForConditionalGeneration(config) for _ in range(2))
    trainer = make_trainer(student, teacher=teacher, train=False)
    trainer.causal_lm = False
    inputs = {"input_ids": torch.randint(11, (2, 6)), "labels": torch.randint(11, (2, 6))}
    with pytest.raises(ValueError, match="needs decoder_input_ids.*DataCollatorForSeq2Seq"):
        trainer.compute_loss(student, inputs)
    inputs["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(inputs["labels"])
    assert trainer.compute_loss(student, inputs).isfinite()


def test_a_loss_that_a_trainer_computes_itself_is_not_replaced(tmp_path, quick_hub):
    "The user's own, TRL's and those of every library; transformers' and SFT's cross-entropy are."
    import transformers
    from trl import DistillationTrainer, SFTTrainer
    from trl.experimental.gkd import GKDTrainer

    class Weighted(transformers.Trainer):
        def compute_loss(self, model, inputs, **named):
            return 2 * super().compute_loss(model, inputs, **named)

    for base in (Weighted, DistillationTrainer, GKDTrainer):
        mixed = type("Mixed", (DistillationTrainerMixin, base), {})
        with pytest.raises(ValueError, match=f"^{base.__name__} has a compute_loss of its own"):
            mixed(teacher=None, distillation_loss=DistillationLoss("ce"))
    mixed = type("Mixed", (DistillationTrainerMixin, SFTTrainer), {})
    with pytest.raises(TypeError, match="model"):
        mixed(teacher=None, distillation_loss=DistillationLoss("ce"))


def test_no_target_of_a_narrow_type_is_taken_for_padding():
    "As uint8, -100 is 156: a class like any other."
    student, teacher = torch.randn(2, 2, 200, generator=torch.Generator().manual_seed(0))
    loss, target = DistillationLoss("kd+sort"), torch.tensor([156, 3])
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint64):
        assert torch.equal(loss(student, teacher, target.to(dtype)), loss(student, teacher, target))
