"""``transformers.Trainer``: a small GPT-2 in DDP, with evaluations, gradients accumulated over two batches, and patience."""

import torch
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from harness.integrations.transformers import resilient


class Counting(Dataset):
    """Sequences that count by a number that is theirs."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) * (index % 7 + 1) + index) % 50
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    args = TrainingArguments(
        output_dir="runs/output",
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="no",
        metric_for_best_model="loss",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    set_seed(args.seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    patience = EarlyStoppingCallback(early_stopping_patience=50)
    trainer = Trainer(model, args, train_dataset=Counting(200), eval_dataset=Counting(40), callbacks=[patience])
    trainer = resilient(trainer, "runs/counting", every_steps=4)
    trainer.train()


if __name__ == "__main__":
    main()
