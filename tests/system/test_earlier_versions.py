"""A run that an earlier version of harness has begun goes on: its checkpoint, its records, its journal.

``fixtures/earlier`` was written by this file, run as a program with the version of commit ae15829: a training that dies of
an error in its seventh step. Without the checkpoint of step 3, and with another host's name.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from torch import nn
from torch.utils.data import Dataset

from harness import Loader, Run, StopRequest

FIXTURE = Path(__file__).parent / "fixtures" / "earlier"
SAVED, DIED, EPOCHS, SAMPLES, BATCH = 6, 7, 3, 22, 4
_POSITION = {"seed": 9, "samples": SAMPLES, "epoch": 0, "offset": 0, "gaps": [], "left_out": []}
BEGINNING = {**_POSITION, "ledger": xxhash.xxh3_128_hexdigest(b""), "ledger_at_epoch": ""}  # as that version had it


class Numbered(Dataset):
    """Samples that say which they are."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        return index, torch.linspace(index, 1, 4)


class History:
    """An object of the program's own."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def state_dict(self) -> dict:
        return {"seen": self.seen, "note": ("a", None, 1.5)}

    def load_state_dict(self, state: dict) -> None:
        self.seen = [list(each) for each in state["seen"]]


def state() -> dict:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    loader = Loader(Numbered(), BATCH, seed=9, drop_last=True)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "history": History()}


def train(url: str, parts: dict, *, dies: bool = False) -> Run:
    run = Run(url, parts, every_steps=3, keep_last=2, stop=StopRequest(), about={"note": "kept"})
    for _ in run.epochs(EPOCHS):
        for indices, x in parts["loader"]:
            loss = parts["model"](x).square().mean()
            parts["optimizer"].zero_grad()
            loss.backward()
            if dies and run.global_step + 1 == DIED:
                error = ValueError("bad sample")
                run.remember_crash(error)
                run.close()
                raise error
            parts["optimizer"].step()
            parts["scheduler"].step()
            parts["history"].seen.append(indices.tolist())
            run.step(loss=loss)
    run.close()
    return run


if __name__ == "__main__":
    train(sys.argv[1], state(), dies=True)


def test_it_resumes_with_the_bits_that_were_saved(tmp_path):
    """All parts, the position, the random states."""
    from harness.checkpoint.catalog import Catalog
    from harness.checkpoint.commit import digest_of
    from harness.storage.store import open_store

    shutil.copytree(FIXTURE, tmp_path / "run")
    manifest = Catalog(open_store(str(tmp_path / "run"))).newest().manifest
    parts = state()
    run = Run(tmp_path / "run", parts, stop=StopRequest())
    assert run.global_step == SAVED
    captured = run.state.capture()
    found = {name: digest_of(captured[name], name) for name in parts}
    assert found == {name: manifest.parts[name].digest for name in parts}
    run.state.restore_random()
    random = {"0": run.state.capture_rank(0)["random"]}
    assert digest_of(random, "random") == manifest.parts["random"].digest
    run.close()


def test_it_goes_on_with_the_samples_that_come_next(tmp_path):
    """To its end, where it has seen what a run has that was not interrupted."""
    shutil.copytree(FIXTURE, tmp_path / "run")
    resumed, straight = state(), state()
    straight["loader"].load_state_dict(BEGINNING)  # the order of the version that has begun the run
    assert train(str(tmp_path / "run"), resumed).global_step == EPOCHS * (SAMPLES // BATCH)
    train(str(tmp_path / "straight"), straight)
    assert resumed["history"].seen == straight["history"].seen
    saved, new = resumed["loader"].state_dict(), state()["loader"].state_dict()
    assert saved.keys() - {"fingerprint"} == BEGINNING.keys(), "the earlier version can go on with it, too"
    assert new["order"] == "feistel"


def test_its_records_and_its_journal_are_read(tmp_path, capsys):
    """The death is known, and the report tells of it."""
    from harness.checkpoint.catalog import Catalog
    from harness.cli import cli
    from harness.storage.store import open_store
    from harness.telemetry import crashes

    shutil.copytree(FIXTURE, tmp_path / "run")
    catalog = Catalog(open_store(str(tmp_path / "run")))
    ((crash,),) = crashes.read_crashes(catalog, catalog.attempts.all()).values()
    assert (crash.step, crash.error, crash.rank) == (DIED, "ValueError: bad sample", 0)
    assert len(crash.samples) == BATCH
    for verb in ("ls", "verify", "report"):
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, str(tmp_path / "run")])
        assert ended.value.code == 0
    assert "ValueError: bad sample" in capsys.readouterr().out
