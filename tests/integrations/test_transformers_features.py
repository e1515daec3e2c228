"""What a ``Trainer`` can do, continued exactly: in this process, stopped twice in the middle of an epoch."""

import pytest
import torch
from torch.utils.data import Dataset

import harness
from harness.errors import ConfigError, Mismatch, Stopped
from tests.support.cluster import newest
from tests.support.integrations import LIBRARIES, require

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _installed(monkeypatch, tmp_path):
    require("transformers", "accelerate")
    if LIBRARIES:
        monkeypatch.syspath_prepend(LIBRARIES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


class Sequences(Dataset):
    """Some of them longer than others; each draws a random number when it is read, if it is to."""

    def __init__(self, *, is_random=False):
        self.is_random = is_random

    def __len__(self):
        return 44

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        ids = (torch.arange(4 + index % 5) * (index % 7 + 1) + index) % 50
        if self.is_random:
            ids = (ids + torch.randint(50, ())) % 50
        return {"input_ids": ids, "labels": ids}


def padded(samples, *, is_random=False):
    """A batch; some of its tokens masked at random, as those of a masked language model."""
    longest = max(len(each["input_ids"]) for each in samples)
    batch = {
        name: torch.stack([torch.nn.functional.pad(each[name], (0, longest - len(each[name]))) for each in samples])
        for name in ("input_ids", "labels")
    }
    if is_random:
        batch["input_ids"] = torch.where(torch.rand(batch["labels"].shape) < 0.2, 0, batch["input_ids"])
    return batch


def masked(samples):
    return padded(samples, is_random=True)


def small():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))


def trainer(url, model=None, dataset=None, collate=padded, callbacks=(), evaluation=None, stop=None, **options):
    from transformers import Trainer, TrainingArguments, set_seed

    from harness.integrations.transformers import resilient

    set_seed(7)
    args = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 3}
    args |= {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    made = Trainer(
        model() if model else small(),
        TrainingArguments(f"{url}-output", **{**args, **options}),
        train_dataset=dataset or Sequences(),
        eval_dataset=evaluation,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    return resilient(made, url, every_steps=100, stop=stop)


def stopping_at(step):
    """A request, and a callback that makes it when a step is over."""
    from transformers import TrainerCallback

    stop = harness.StopRequest()

    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                stop.ask("the test")

    return stop, Asks()


def trained_twice(**options):
    """The end of a training that was left alone, and that of one which was stopped twice."""
    callbacks = options.pop("callbacks", list)
    alone = trainer("straight", callbacks=callbacks(), stop=harness.StopRequest(), **options)
    alone.train()
    for step in (4, 9):
        stop, asks = stopping_at(step)
        with pytest.raises(Stopped, match=f"step {step}"):
            trainer("stopped", callbacks=[*callbacks(), asks], stop=stop, **options).train()
    last = trainer("stopped", callbacks=callbacks(), stop=harness.StopRequest(), **options)
    last.train()
    return alone, last


def timeless(history):
    return [
        {key: value for key, value in line.items() if "_runtime" not in key and "_per_second" not in key} for line in history
    ]


def assert_alike(alone, last):
    assert timeless(last.state.log_history) == timeless(alone.state.log_history)
    straight, stopped = newest("straight"), newest("stopped")
    for name in ("model", "optimizer", "scheduler"):
        assert stopped["digests"][name] == straight["digests"][name], name
    values = zip(alone.model.state_dict().values(), last.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in values)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"collate": masked}, id="random-collator"),
        pytest.param({"dataset": Sequences(is_random=True)}, id="random-samples"),
        pytest.param({"dataset": Sequences(is_random=True), "dataloader_num_workers": 2}, id="random-workers"),
        pytest.param({"train_sampling_strategy": "group_by_length"}, id="group-by-length"),
        pytest.param({"gradient_accumulation_steps": 2, "num_train_epochs": 4}, id="accumulation"),
        pytest.param({"lr_scheduler_type": "cosine", "warmup_steps": 5, "max_steps": 17}, id="max-steps"),
    ],
)
def test_stopped_twice_in_the_middle_of_an_epoch(options):
    """The same weights, moments, schedule and log, whatever draws random numbers."""
    assert_alike(*trained_twice(**options))


def test_lora():
    """An adapter of PEFT: the frozen weights stay, and the adapter continues."""
    require("peft")
    from peft import LoraConfig, get_peft_model

    model = lambda: get_peft_model(small(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert_alike(*trained_twice(model=model))


def test_a_stream_of_datasets():
    """It is shuffled in a buffer; what a collator draws on top continues, too."""
    require("datasets")
    from datasets import IterableDataset

    def rows(shards):
        for shard in shards:
            for index in range(30):
                ids = [(shard + index * step) % 50 for step in range(5)]
                yield {"input_ids": ids, "labels": ids}

    def stream():
        made = IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1]})
        return made.shuffle(seed=3, buffer_size=10).with_format("torch")

    assert_alike(*trained_twice(dataset=stream(), collate=masked, max_steps=14))


def test_the_best_model():
    """Early stopping and ``load_best_model_at_end`` know the best of all attempts."""
    from transformers import EarlyStoppingCallback

    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "num_train_epochs": 4, "learning_rate": 0.3}
    patience = lambda: [EarlyStoppingCallback(early_stopping_patience=3)]
    alone, last = trained_twice(callbacks=patience, evaluation=Sequences(), **options)
    assert_alike(alone, last)
    assert 9 < alone.state.global_step < 44, "patience has ended it"
    again = trainer("stopped", callbacks=patience(), evaluation=Sequences(), stop=harness.StopRequest(), **options)
    again.train()
    assert again.state.global_step == last.state.global_step, "a run that has ended trains nothing more"


def test_what_it_refuses(monkeypatch):
    """What would not be exact, and the resume that it replaces."""
    with pytest.raises(ConfigError, match="auto_find_batch_size"):
        trainer("refused", auto_find_batch_size=True)
    with pytest.raises(ConfigError, match="leave resume_from_checkpoint out"):
        trainer("refused").train(resume_from_checkpoint="checkpoint-2")
    from harness.integrations.transformers import resilient

    with pytest.raises(ConfigError, match="expected a Trainer of transformers 5"):
        resilient(object(), "refused")


def test_another_number_of_ranks_is_refused():
    """The position counts the batches of each rank."""
    stop, asks = stopping_at(3)
    with pytest.raises(Stopped):
        trainer("ranks", callbacks=[asks], stop=stop).train()
    from harness.integrations import prepared

    made = trainer("ranks", stop=harness.StopRequest())
    position = prepared.Prepared("loader", made.accelerator.prepare(torch.utils.data.DataLoader(Sequences())), 2)
    saved = newest("ranks")["parts"]["position"]["0"]["state"]
    with pytest.raises(Mismatch, match="start with as many ranks as before"):
        position.check_state_dict(saved)
