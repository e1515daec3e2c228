"""``transformers.Trainer``: a small GPT-2 on a shuffled stream of ``datasets``, with tokens hidden at random."""

from collections.abc import Iterator

import torch
from datasets import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from harness.integrations.transformers import resilient


def rows(shards: list[int]) -> Iterator[dict[str, list[int]]]:
    """Sequences that count by a number that is theirs."""
    for shard in shards:
        for index in range(400):
            ids = [(shard + index + step * (index % 7 + 1)) % 50 for step in range(12)]
            yield {"input_ids": ids, "labels": ids}


def hidden(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, in which a token is hidden with a probability of 0.15."""
    batch = {name: torch.stack([torch.as_tensor(each[name]) for each in features]) for name in features[0]}
    return {**batch, "input_ids": batch["input_ids"].masked_fill(torch.rand(batch["labels"].shape) < 0.15, 0)}


def main() -> None:
    args = TrainingArguments(
        output_dir="runs/output",
        max_steps=40,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    set_seed(args.seed)
    stream = IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1]}).shuffle(seed=1, buffer_size=50)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    trainer = Trainer(model, args, train_dataset=stream, data_collator=hidden)
    trainer = resilient(trainer, "runs/stream", every_steps=5)
    trainer.train()


if __name__ == "__main__":
    main()
