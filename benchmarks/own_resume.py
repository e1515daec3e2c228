"""What the libraries' own resumes keep: each example of ``docs/examples/integrations``, without harness, killed in an epoch.

    python benchmarks/own_resume.py            # a folder in /tmp, one process each, about four minutes

The process is killed after a step of the first epoch, started again with the library's own resume, and compared with a
process that was left alone: which steps were trained twice, and whether the weights at the end are the same.
"""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples" / "integrations"
SAVE_EVERY, KILL_AT = 9, 14


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(module):
    tensors = (each.detach().numpy().tobytes() for each in module.state_dict().values())
    return hashlib.sha256(b"".join(tensors)).hexdigest()[:12]


def trained(step):
    with open("steps", "a") as file:
        print(step, file=file)
    if step == KILL_AT and not os.path.exists("killed") and len(sys.argv) > 3:
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def masked(features):
    """A batch, of which each token is hidden with a probability of 0.15, as for a masked language model."""
    import torch

    batch = {name: torch.stack([each[name] for each in features]) for name in features[0]}
    return {**batch, "input_ids": batch["input_ids"].masked_fill(torch.rand(batch["labels"].shape) < 0.15, 0)}


def transformers_masked():
    transformers(data_collator=masked)


def transformers_lora():
    transformers("trainer_lora")


def transformers_stream():
    transformers("trainer_stream")


def transformers(name="trainer", **options):
    import functools

    import transformers

    module = example(name)
    module.Trainer = functools.partial(module.Trainer, **options)

    class Kills(transformers.TrainerCallback):
        def on_step_end(self, _args, state, control, **_):
            if not control.should_save:
                trained(state.global_step)

        def on_save(self, _args, state, _control, **_):
            trained(state.global_step)

    def plain(trainer, *_args, **_options):
        args = trainer.args
        args.save_strategy, args.save_steps = transformers.trainer_utils.SaveStrategy.STEPS, SAVE_EVERY
        trainer.add_callback(Kills())
        train = trainer.train

        def resumed():
            last = (
                transformers.trainer_utils.get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
            )
            train(resume_from_checkpoint=last)
            print("digest", digest(trainer.model))

        trainer.train = resumed
        return trainer

    module.resilient = plain
    module.main()


def lightning_two():
    lightning("lightning_gan")


def lightning(name="lightning_rings"):
    import lightning as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = example(name)
    optimizers = 2 if name == "lightning_gan" else 1  # a step of each counts

    class Plain(ModelCheckpoint):
        def __init__(self, *_args, **_options):
            super().__init__("own", every_n_train_steps=SAVE_EVERY * optimizers, save_top_k=-1)

        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            if trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate():
                return
            trained(trainer.global_step // optimizers)

    fit = pl.Trainer.fit

    def resumed(self, model, *loaders):
        found = sorted(Path("own").glob("*.ckpt"), key=os.path.getmtime)
        fit(self, model, *loaders, ckpt_path=str(found[-1]) if found else None, weights_only=False)
        print("digest", digest(model))

    pl.Trainer.fit = resumed
    module.Resilient = Plain
    module.L = types.SimpleNamespace(
        Trainer=lambda **options: pl.Trainer(**{**options, "enable_checkpointing": True}), seed_everything=pl.seed_everything
    )
    module.main()


def accelerate():
    """As the library's documentation has it: ``save_state``, ``load_state`` and ``skip_first_batches``."""
    module = example("accelerated")

    class Place:
        epoch = batch = step = 0

        def state_dict(self):
            return dict(self.__dict__)

        def load_state_dict(self, state):
            self.__dict__.update(state)

    class Own:
        def __init__(self, accelerator, loader):
            self.accelerator, self.loader, self.place = accelerator, loader, Place()
            accelerator.register_for_checkpointing(self.place)
            if found := sorted(Path("own").glob("*"), key=os.path.getmtime):
                accelerator.load_state(str(found[-1]))

        def epochs(self, total):
            while self.place.epoch < total:
                yield self.place.epoch
                self.place.epoch, self.place.batch = self.place.epoch + 1, 0
            print("digest", digest(self.accelerator._models[0]))

        def __iter__(self):
            self.loader.set_epoch(self.place.epoch)
            for batch in self.accelerator.skip_first_batches(self.loader, self.place.batch):
                yield batch
                self.place.batch += 1
                if self.accelerator.sync_gradients:
                    self.place.step += 1
                    if self.place.step % SAVE_EVERY == 0:
                        self.accelerator.save_state(f"own/{self.place.step}")
                    trained(self.place.step)

    def plain(accelerator, loader, *_args, **_options):
        own = Own(accelerator, loader)
        return own, own

    module.resilient = plain
    module.main()


def started(library, folder, *further):
    command = [sys.executable, str(Path(__file__).absolute()), library, "train", *further]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("digest")]
    if not lines and done.returncode != -signal.SIGKILL:
        raise SystemExit(done.stderr[-3000:])
    return lines[0] if lines else ""


def main():
    for library in sys.argv[1:] or (
        "transformers",
        "transformers_masked",
        "transformers_lora",
        "transformers_stream",
        "lightning",
        "lightning_two",
        "accelerate",
    ):
        with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as killed:
            expected = started(library, alone)
            started(library, killed, "kill")
            found = started(library, killed, "kill")
            steps = [int(each) for each in Path(killed, "steps").read_text().split()]
            twice = len(steps) - len(set(steps))
            alike = "the same weights" if found == expected else "other weights"
            print(f"{library}: killed after step {KILL_AT}, {twice} steps trained twice, {alike} at the end")


if __name__ == "__main__":
    if sys.argv[2:3] == ["train"]:
        globals()[sys.argv[1]]()
    else:
        main()
