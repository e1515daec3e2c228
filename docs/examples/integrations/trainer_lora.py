"""``transformers.Trainer``: an adapter of PEFT (LoRA), trained with tokens hidden at random."""

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from harness.integrations.transformers import resilient


class Counting(Dataset):
    """Sequences that count by a number that is theirs."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) * (index % 7 + 1) + index) % 50
        return {"input_ids": ids, "labels": ids}


def hidden(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, in which a token is hidden with a probability of 0.15."""
    batch = {name: torch.stack([each[name] for each in features]) for name in features[0]}
    return {**batch, "input_ids": batch["input_ids"].masked_fill(torch.rand(batch["labels"].shape) < 0.15, 0)}


def main() -> None:
    args = TrainingArguments(
        output_dir="runs/output",
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    set_seed(args.seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    trainer = Trainer(model, args, train_dataset=Counting(), data_collator=hidden)
    trainer = resilient(trainer, "runs/adapter", every_steps=5)
    trainer.train()


if __name__ == "__main__":
    main()
