"Sorting inside the loops of timm, TRL and NVIDIA ModelOpt, each of them the real library."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sortkd import DistillationLoss, kd_loss, sort_logits
from sortkd.loops.integrations import DistillationTaskMixin, ModelOptLoss, SortedGKDMixin

VOCABULARY, LENGTH = 13, 8


class LanguageModel(nn.Module):
    "Logits `(B, T, V)` of tokens `(B, T)`."

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, tokens):
        return 3 * self.head(torch.tanh(self.embedding(tokens)))


# ---- timm ----


@pytest.fixture
def make_task():
    import timm
    from timm.task import LogitDistillationTask

    class DistillationTask(DistillationTaskMixin, LogitDistillationTask):
        pass

    def make(method="kd+sort", **named):
        torch.manual_seed(0)
        student, teacher = (timm.create_model("test_vit", img_size=32, num_classes=5) for _ in range(2))
        teacher.pretrained_cfg = {"mean": (0.4,) * 3, "std": (0.2,) * 3}
        with torch.no_grad():
            teacher.head.weight.mul_(50)
        return DistillationTask(student, teacher, distillation_loss=DistillationLoss(method), verbose=False, **named), student, teacher

    return make


def test_timm_trains_like_a_loop_by_hand(make_task):
    task, student, teacher = make_task()
    by_hand, mean, std = copy.deepcopy(student), 0.5, 0.5  # test_vit's own
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    assert student.pretrained_cfg["mean"] == (mean,) * 3 and student.pretrained_cfg["std"] == (std,) * 3
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (task.get_trainable_module(), by_hand)]
    for _ in range(2):
        result = task.train()(images, target)
        output = by_hand.train()(images)
        with torch.no_grad():
            teacher_logits = teacher.eval()((images * std + mean - 0.4) / 0.2)
        loss = 0.1 * F.cross_entropy(output, target) + 0.9 * kd_loss(output, sort_logits(teacher_logits, target), 4.0)
        torch.testing.assert_close(result["loss"], loss)
        for optimizer, value in zip(optimizers, (result["loss"], loss)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for one, other in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert task.distillation_loss.teacher_wrong.any() and result["output"].shape == (4, 5)
    assert all(each.grad is None for each in teacher.parameters())


def test_timm_passes_the_epoch_on_and_refuses_what_has_no_effect(make_task):
    images, target = torch.randn(2, 3, 32, 32), torch.arange(2)
    task, *_ = make_task("dkd+sort")
    with pytest.raises(ValueError, match="needs to know the epoch"):
        task(images, target)
    losses = []
    for task.epoch in (1, 2):
        losses.append(task.eval()(images, target)["loss"])
    assert losses[0] != losses[1]
    with pytest.raises(TypeError, match="class indices"):
        task(images, torch.full((2, 5), 0.2))  # mixup
    with pytest.raises(ValueError, match="^task_loss_weight, temperature of timm's own loss"):
        make_task(temperature=2.0, task_loss_weight=0.5)
    with pytest.raises(ValueError, match="^criterion of timm's own loss"):
        type(task)(task.trainable_module, task.teacher, nn.CrossEntropyLoss(), distillation_loss=DistillationLoss())
    with pytest.raises(ValueError, match="learns its temperature"):
        make_task("ctkd")


def test_timm_accumulates_gradients(make_task):
    images, target = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, -100, 4])
    whole, (parts, *_) = make_task()[0].eval(), make_task()
    whole(images, target)["loss"].backward()
    parts.eval().num_items = 5
    for part in (slice(0, 4), slice(4, 6)):
        parts(images[part], target[part])["loss"].backward()
    pairs = list(zip(*(task.trainable_module.parameters() for task in (whole, parts)), strict=True))
    norm = sum(each.grad.norm() ** 2 for each, _ in pairs) ** 0.5
    assert all((one.grad - other.grad).norm() < 1e-6 * norm for one, other in pairs)


def test_timm_has_other_tasks_that_must_not_be_replaced():
    from timm.task import FeatureDistillationTask, TokenDistillationTask

    for base in (FeatureDistillationTask, TokenDistillationTask):
        with pytest.raises(ValueError, match=f"^{base.__name__} has a forward of its own"):
            type("Task", (DistillationTaskMixin, base), {})(None, None, distillation_loss=DistillationLoss())


# ---- TRL ----


@pytest.fixture
def make_gkd(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # which takes longer than the training before it
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class SortedGKDTrainer(SortedGKDMixin, GKDTrainer):
        pass

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")
    torch.manual_seed(0)
    tokens = torch.randint(2, VOCABULARY, (4, LENGTH))
    labels = tokens.clone()
    labels[1:, :3] = labels[1, 6:] = labels[2:, :7] = -100  # prompts, and padding: of 7, 3, 1 and 1 tokens
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    def networks():
        torch.manual_seed(1)
        config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, bos_token_id=1,
                                         eos_token_id=1, initializer_range=0.5, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        return transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config).eval()

    def make(kind=SortedGKDTrainer, accepts=True, **settings):
        student, teacher = networks()
        student.accepts_loss_kwargs = accepts
        arguments = GKDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                              **{"lmbda": 0.0, "max_steps": 2, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1,
                                 "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "disable_tqdm": True, "logging_strategy": "no",
                                 "save_strategy": "no", "dataloader_pin_memory": False} | settings)
        return kind(model=student, teacher_model=teacher, args=arguments, processing_class=tokenizer,
                    train_dataset=Dataset.from_dict({name: value.tolist() for name, value in batch.items()}),
                    data_collator=transformers.default_data_collator)

    make.batch, make.plain, make.networks = batch, GKDTrainer, networks
    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_trl_sorts_before_its_divergence(make_gkd, beta):
    trainer, plain, batch = make_gkd(beta=beta), make_gkd(make_gkd.plain, beta=beta), make_gkd.batch
    with torch.no_grad():
        student, teacher = (model.eval()(batch["input_ids"]).logits for model in (trainer.model, trainer.teacher_model))
    counts = batch["labels"][:, 1:] != -100
    student, teacher, labels = student[:, :-1][counts], teacher[:, :-1][counts], batch["labels"][:, 1:][counts]
    log_q, log_p = student.log_softmax(1), sort_logits(teacher, labels).log_softmax(1)
    mixture = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    divergence = log_p.exp() @ (log_p - log_q).T if beta == 0 else (
        beta * log_p.exp() @ (log_p - mixture).T + (1 - beta) * log_q.exp() @ (log_q - mixture).T)
    expected = divergence.diagonal().mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)
    assert abs(plain.compute_loss(plain.model, batch) - expected) > 1e-3, "without sorting"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("accepts", "shifts"), [(True, True), (False, True), (True, False)])
def test_trl_trains_like_a_loop_by_hand(make_gkd, accepts, shifts):
    "Also with gradients accumulated over parts of which different numbers of tokens count, whatever TRL makes of the student."
    batch, (by_hand, teacher) = make_gkd.batch, make_gkd.networks()
    counts = batch["labels"][:, 1:] != -100
    assert counts.sum(1).tolist() == [7, 3, 1, 1]
    labels = batch["labels"][:, 1:][counts]
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            teacher_logits = sort_logits(teacher(batch["input_ids"]).logits[:, :-1][counts], labels)
        optimizer.zero_grad()
        kd_loss(by_hand(batch["input_ids"]).logits[:, :-1][counts], teacher_logits, 1.0).backward()
        optimizer.step()
    for size in (4, 2):
        trainer = make_gkd(beta=0.0, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
                           train_sampling_strategy="sequential", accepts=accepts)
        trainer._loss_shifts_labels = shifts
        trainer.train()
        for one, other in zip(trainer.model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lmbda": 0.5}, "lmbda=0.0 and seq_kd=False"), ({"seq_kd": True}, "lmbda=0.0 and seq_kd=False"),
     ({"use_liger_kernel": True}, "set use_liger_kernel=False")],
)
def test_trl_must_not_sort_towards_sampled_tokens_nor_nothing(make_gkd, settings, message):
    with pytest.raises(ValueError, match=message):
        make_gkd(**settings)


@pytest.mark.filterwarnings("ignore")
def test_trl_without_the_divergence_is_refused(make_gkd):
    "At construction where that can be told, else before a step."
    import trl

    class OtherLoss(make_gkd.plain):
        use_liger_gkd_loss = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    trainer = make_gkd(type("Sorted", (SortedGKDMixin, OtherLoss), {}))
    with pytest.raises(RuntimeError, match="without generalized_jsd_loss, so nothing was sorted"):
        trainer.train()
    OtherLoss.use_liger_gkd_loss = True
    with pytest.raises(ValueError, match="Liger's loss never shows"):
        make_gkd(type("Sorted", (SortedGKDMixin, OtherLoss), {}))
    with pytest.raises(ValueError, match="DistillationTrainer never holds a whole row"):
        type("Sorted", (SortedGKDMixin, trl.DistillationTrainer), {})(model=None)
    with pytest.raises(TypeError, match="write class Sorted\\(SortedGKDMixin, GKDTrainer\\)"):
        type("Sorted", (make_gkd.plain, SortedGKDMixin), {})


# ---- NVIDIA ModelOpt ----


def test_a_criterion_for_modelopt():
    "It is one of PyTorch's losses, as ModelOpt's configuration demands, and takes ModelOpt's names."
    torch.manual_seed(0)
    student, teacher, labels = *torch.randn(2, 3, 5, VOCABULARY), torch.randint(VOCABULARY, (3, 5))
    criterion = ModelOptLoss("dkd+sort", ignore_index=0)
    assert isinstance(criterion, nn.modules.loss._Loss)
    value = criterion(logits_s=student, logits_t=teacher, labels=labels, epoch=3)
    assert value == DistillationLoss("dkd+sort", ignore_index=0)(student, teacher, labels, 3)
    parts = [criterion(student[each], teacher[each], labels[each], 3, num_items=(labels != 0).sum()) for each in (slice(1), slice(1, 3))]
    torch.testing.assert_close(sum(parts), value)
    with pytest.raises(ValueError, match="KDTrainer cannot pass them"):
        criterion(student, teacher)  # as its Hugging Face trainer calls a criterion
    with pytest.raises(ValueError, match="learns its temperature"):
        ModelOptLoss("ctkd")


@pytest.mark.slow  # its import alone takes ten seconds; not in [dev]: pip install nvidia-modelopt transformers
@pytest.mark.filterwarnings("ignore")
def test_modelopt_itself():
    distill = pytest.importorskip("modelopt.torch.distill")
    student, teacher = LanguageModel(0), LanguageModel(1)
    tokens, labels = torch.randint(VOCABULARY, (2, 3, LENGTH))
    labels[:, :3] = labels[0, 4:] = -100
    by_hand = copy.deepcopy(student)
    model = distill.convert(student, mode=[("kd_loss", {"teacher_model": teacher, "criterion": ModelOptLoss("kd+sort")})])
    model.train()  # which returns nothing
    loss = 0.0
    for part in (slice(0, 1), slice(1, 3)):  # accumulating gradients
        model(tokens[part])
        loss += model.compute_kd_loss(labels=labels[part], num_items=(labels != -100).sum())
    loss.backward()
    expected = DistillationLoss("kd+sort")(by_hand(tokens), LanguageModel(1)(tokens), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.head.weight.grad, by_hand.head.weight.grad)
    model(tokens)
    with pytest.raises(ValueError, match="passed no labels"):
        model.compute_kd_loss()
