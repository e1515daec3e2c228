"""What the libraries' own resumes keep: each example of ``docs/examples/integrations``, without harness, killed in an epoch.

    python benchmarks/own_resume.py            # a folder in /tmp, one process each, about two minutes

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


def transformers(**options):
    import functools

    import transformers

    module = example("trainer")
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


def lightning():
    import lightning as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = example("lightning_rings")

    class Plain(ModelCheckpoint):
        def __init__(self, *_args, **_options):
            super().__init__("own", every_n_train_steps=SAVE_EVERY, save_top_k=-1)

        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            if not trainer.fit_loop._should_accumulate():
                trained(trainer.global_step)

    fit = pl.Trainer.fit

    def resumed(self, model, *loaders):
        found = sorted(Path("own").glob("*.ckpt"), key=os.path.getmtime)
        fit(self, model, *loaders, ckpt_path=str(found[-1]) if found else None, weights_only=False)
        print("digest", digest(model))

    pl.Trainer.fit = resumed
    module.Resilient = Plain
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
    for library in sys.argv[1:] or ("transformers", "transformers_masked", "lightning"):
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
