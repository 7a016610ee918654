"""A language model distilled by Hugging Face's plain Trainer, which never holds the logits (B, T, V).

    python examples/token_distillation.py

trains a tiny model for ten steps, in seconds. For models of your own load them with `AutoModelForCausalLM.from_pretrained`, and
set the labels of a prompt, of padding and of the first token to -100.
"""
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sortkd.token_lists import shifted_target
from sortkd.tokens import LinearDistillationLoss


class TokenTrainer(Trainer):
    def __init__(self, *arguments, teacher, method="kd(temperature=1,ce_weight=0.5,kd_weight=0.5)+sort", **named):
        super().__init__(*arguments, **named)
        self.teacher = teacher.to(self.args.device).eval()
        vocabulary = min(self.model.config.vocab_size, teacher.config.vocab_size)  # they may be padded
        self.distillation_loss = LinearDistillationLoss(method, vocabulary=vocabulary)
        self.model_accepts_loss_kwargs = True  # the Trainer counts the tokens of all batches of a step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        target = shifted_target(inputs["labels"])  # the token that comes next
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        with torch.no_grad():
            teacher = self.teacher.model(**tokens)[0]
        loss = self.distillation_loss(
            model.model(**tokens)[0], model.lm_head, teacher, self.teacher.lm_head, target, num_items=num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss


def tiny(width: int, vocabulary: int = 300) -> LlamaForCausalLM:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, pad_token_id=None, **sizes))


def main(folder: str = "token_distillation") -> TokenTrainer:
    torch.manual_seed(0)
    tokens = torch.randint(300, (16, 33))
    labels = tokens.masked_fill(torch.arange(33) < 5, -100)  # the first five are the prompt
    rows = [{"input_ids": one, "labels": two} for one, two in zip(tokens, labels)]
    settings = TrainingArguments(folder, max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                                 report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), logging_steps=5)
    trainer = TokenTrainer(tiny(32), settings, train_dataset=rows, teacher=tiny(48, vocabulary=320))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
