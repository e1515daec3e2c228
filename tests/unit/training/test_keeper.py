"""What a rank keeps on its way out, and when that counts: in the test process, where an error stands for a peer's death.

Real ranks are killed in ``tests/proofs/test_kill.py``.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import harness
from harness import Loader, Run, StopRequest
from harness.checkpoint import commit, kept, load
from harness.checkpoint.carry import carry, carry_and_tell
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.kept import KeptPlace
from harness.cli import cli
from harness.data.seeding import random_state, seed_everything
from harness.data.streams import keys_here, seed_streams, stream_states
from harness.errors import StoreError
from harness.storage.store import Store, open_store
from harness.telemetry.journal import tells_of_save
from harness.training import loose, resume
from tests.support.states import bits

CPU = torch.device("cpu")


class Died(Exception):
    """In place of a peer's death."""


Die = Callable[[int, str], None]


class Training:
    """A loop of a program's own, with dropout and a schedule. ``die`` is called with the step and the place."""

    def __init__(self, folder: Path, *, every: int | None = 4, model: nn.Module | None = None, **settings) -> None:
        seed_everything(0)
        plain = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))
        self.model = model or plain
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.5)
        x = torch.randn(40, 4)
        self.loader = Loader(TensorDataset(x, x.sum(1, keepdim=True)), 8)
        (folder / "keep").mkdir(parents=True, exist_ok=True)
        state = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "loader": self.loader}
        checkpoint = {"keep": str((folder / "keep").absolute()), **settings}
        config = {"log": {"every_steps": None}, "checkpoint": checkpoint}
        self.run = Run(str(folder / "run"), state, every_steps=every, stop=StopRequest(), config=config)
        self.began_at = self.run.global_step

    def train(self, die: Die = lambda *_: None, epochs: int = 3) -> "Training":
        """Fifteen steps, or until an error."""
        run, step = self.run, self.run.global_step
        with contextlib.closing(run):
            try:
                for _ in run.epochs(epochs):
                    for x, y in self.loader:
                        step += 1
                        die(step, "forward")
                        loss = F.mse_loss(self.model(x), y)
                        self.optimizer.zero_grad()
                        loss.backward()
                        die(step, "backward")
                        self.optimizer.step()
                        die(step, "optimizer")
                        run.step(loss=loss)
                        die(step, "body")
                        self.scheduler.step()
            except Died as error:
                run.remember_crash(error)
                raise
        return self


def dying(step: int, place: str = "backward") -> Die:
    """Dies there."""

    def die(*now: object) -> None:
        if now == (step, place):
            raise Died

    return die


def die(folder: Path, step: int, place: str = "backward", **settings) -> Training:
    """A training that has died."""
    training = Training(folder, **settings)
    with pytest.raises(Died):
        training.train(dying(step, place))
    return training


def digests(folder: Path) -> dict[str, str]:
    """Those of the newest checkpoint."""
    manifest = Catalog(open_store(str(folder / "run"))).newest().manifest
    return {name: part.digest for name, part in manifest.parts.items()}


def kept_in(folder: Path) -> Path | None:
    """The directory of the run, where something is kept."""
    return next((folder / "keep").glob("harness-*/*"), None)


def kept_steps(folder: Path) -> list[int]:
    """What is kept, whole."""
    where = kept_in(folder)
    return [] if where is None else [each.step for each in Catalog(open_store(str(where))).entries() if each.manifest]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The end of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    Training(folder).train()
    return digests(folder)


# --- random states ---------------------------------------------------------------------------------------------------


def test_the_states_of_a_stream_are_known_without_drawing_from_it():
    seed_everything(3)
    keys = keys_here(CPU)
    seed_streams(keys, 7, CPU)
    here = random_state(CPU)
    seed_everything(4)
    assert bits(stream_states(keys, 7, CPU)) == bits(here)


def test_streams_that_are_alike_have_one_key():
    """Each generator has its own: some programs seed torch by rank, and Python alike on all."""
    seed_everything(1)
    first = keys_here(CPU)
    torch.manual_seed(2)
    second = keys_here(CPU)
    assert [one == other for one, other in zip(first, second, strict=True)] == [True, True, False]


def test_a_run_goes_on_as_it_began(tmp_path):
    """With states that are carried on, whatever the setting is now; and then nothing is kept."""
    die(tmp_path, 6, random="carried", keep=None)
    training = die(tmp_path, 10)
    assert (training.began_at, training.run.state.progress.random_keys, kept_steps(tmp_path)) == (4, None, [])
    Training(tmp_path).train()
    Training(tmp_path / "straight", random="carried").train()
    assert digests(tmp_path) == digests(tmp_path / "straight")


def test_a_save_holds_keys_and_no_states(tmp_path):
    """The states follow from them, unless something was drawn since the boundary: here after the loop was left."""

    def saved() -> list[str]:
        return [*harness.load(str(tmp_path / "run"))["random"]["0"]]

    die(tmp_path, 6)
    assert saved() == ["keys"]
    training = Training(tmp_path)
    for _ in training.run.epochs(3):
        for _ in training.loader:
            training.run.step()
            break
        break
    drawn = torch.rand(3)
    training.run.finish()
    assert {"keys", "python", "numpy", "torch"} <= {*saved()}
    after = torch.rand(3)
    training.run.close()
    again = Training(tmp_path)
    again.run.state.restore_random()
    assert torch.equal(torch.rand(3), after) and not torch.equal(after, drawn)
    again.run.close()


def test_with_other_ranks_the_keys_are_made_anew(tmp_path, monkeypatch):
    """From what the program has seeded, as the streams always were."""
    before = die(tmp_path, 6, keep=None).run.state.progress.random_keys
    monkeypatch.setattr(resume, "conditions", lambda *_: {"world_size": 2})
    training = Training(tmp_path)
    assert training.run.state.progress.random_keys == []
    training.train()
    assert training.run.state.progress.random_keys == before


# --- keeping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "place"), [(7, "forward"), (7, "backward"), (6, "backward"), (11, "backward"), (2, "forward")]
)
def test_nothing_is_lost(tmp_path, straight, step, place):
    """A death before an optimizer's step: the run goes on from the boundary before it, and ends with the same bits."""
    die(tmp_path, step, place)
    training = Training(tmp_path)
    assert training.began_at == step - 1
    training.train()
    assert digests(tmp_path) == straight
    assert kept_in(tmp_path) is None, "what is kept is not needed after the end"


@pytest.mark.parametrize("place", ["optimizer", "body"])
def test_a_touched_state_is_not_kept(tmp_path, straight, caplog, place):
    """Between an optimizer's step and the end of the body the state is no checkpoint's: the last one counts."""
    die(tmp_path, 7, place)
    assert kept_steps(tmp_path) == []
    assert "step 6 is not kept, the last checkpoint counts: an optimizer has begun its next step" in caplog.text
    training = Training(tmp_path)
    assert training.began_at == 4
    training.train()
    assert digests(tmp_path) == straight


def test_deaths_one_after_the_other(tmp_path, straight):
    """Before anything is durable, and before the first save after a resume is."""
    for step, began_at in ((3, 0), (4, 2), (6, 3), (6, 5), (9, 5), (14, 8)):
        assert die(tmp_path, step, every=1000).began_at == began_at
    Training(tmp_path).train()
    assert digests(tmp_path) == straight


def test_only_a_durable_save_removes_what_was_kept(tmp_path):
    """The first thing after such a resume is a save, whatever the interval is."""
    die(tmp_path, 7, every=1000)
    training = Training(tmp_path, every=1000)
    seen = []

    def look(step: int, place: str) -> None:
        if place == "forward":
            training.run._attempt.saves._saver._under_way and training.run._attempt.saves._saver._under_way.join()
            whole = [each.step for each in Catalog(open_store(str(tmp_path / "run"))).entries() if each.state == "whole"]
            seen.append((step, whole, kept_steps(tmp_path)))

    training.train(look)
    assert seen[0] == (7, [], [6])
    assert seen[1][:2] == (8, [7])
    assert seen[-1][2] == [], "and the rest of the run does not need it"


def test_options_are_those_of_the_boundary(tmp_path, straight):
    """A loop may set a learning rate before it steps; a death after that must not set it twice."""

    def train(folder: Path, at: int = 0) -> Training:
        training = Training(folder)

        def act(step: int, place: str) -> None:
            if place == "forward":
                training.optimizer.param_groups[0]["lr"] *= 0.9
            if (step, place) == (at, "backward"):
                raise Died

        return training.train(act)

    train(tmp_path / "straight")
    with pytest.raises(Died):
        train(tmp_path, 7)
    assert kept_steps(tmp_path) == [6]
    train(tmp_path)
    assert digests(tmp_path) == digests(tmp_path / "straight")


class Counting(nn.Module):
    """A model with a buffer of its own, which each forward pass changes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
        self.register_buffer("seen", torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.net(x)


def test_what_a_forward_pass_changes_is_copied_while_it_is_small(tmp_path, monkeypatch, caplog):
    """Statistics of BatchNorm, say. Of a large tensor there is no copy: where it has changed, nothing is kept."""
    Training(tmp_path / "straight", model=Counting(4)).train()
    die(tmp_path / "small", 7, model=Counting(4))
    assert kept_steps(tmp_path / "small") == [6]
    Training(tmp_path / "small", model=Counting(4)).train()
    assert digests(tmp_path / "small") == digests(tmp_path / "straight")
    monkeypatch.setattr(loose, "SMALL_BYTES", 1000)
    die(tmp_path / "large", 7, model=Counting(400))
    assert kept_steps(tmp_path / "large") == []
    assert "model.seen changed outside of optimizer.step()" in caplog.text
    die(tmp_path / "before", 7, "forward", model=Counting(400))
    assert kept_steps(tmp_path / "before") == [6], "it had not changed yet"


def test_weights_that_are_moved_before_the_optimizer_are_seen(tmp_path, caplog):
    """As SAM moves them between two backward passes."""
    training = Training(tmp_path)

    def move(step: int, place: str) -> None:
        if (step, place) == (7, "backward"):
            with torch.no_grad():
                for each in training.model.parameters():
                    each.add_(0.01)
            raise Died

    with pytest.raises(Died):
        training.train(move)
    assert kept_steps(tmp_path) == []
    assert "changed outside of optimizer.step()" in caplog.text


def test_a_state_that_changes_while_it_is_written_is_not_committed(tmp_path, monkeypatch, caplog):
    """The main thread may wake up while another one keeps the state."""
    training = Training(tmp_path)
    write_share = commit.write_share

    def changed(*arguments: object, **options: object) -> object:
        receipt = write_share(*arguments, **options)
        training.run._attempt.saves.keeper.touch()
        return receipt

    def watch(step: int, place: str) -> None:
        if (step, place) == (7, "backward"):
            monkeypatch.setattr(commit, "write_share", changed)
            raise Died

    with pytest.raises(Died):
        training.train(watch)
    assert kept_steps(tmp_path) == []
    assert "an optimizer has begun its next step" in caplog.text


def test_of_a_machine_one_rank_keeps_a_step(tmp_path):
    place = KeptPlace.of(str(tmp_path), "there", Catalog(open_store(str(tmp_path))).attempts.claim({}))
    first = Catalog(open_store(str(tmp_path))).attempts.claim({})
    place.make()
    assert [place.claim(first, 3), place.claim(first, 3), place.claim(first, 4)] == [True, False, True]


# --- what can go wrong -----------------------------------------------------------------------------------------------


class Cut(BaseException):
    """The process is killed."""


_FILES = ("model.safetensors", "optimizer.safetensors", "manifest.json")
CUTS = [
    "before the claim",
    "after the claim",
    *(f"{when} {file}" for file in _FILES for when in ("before", "inside", "after")),
]


@pytest.mark.parametrize("cut", CUTS)
def test_killed_while_it_keeps(tmp_path, straight, monkeypatch, cut):
    """Wherever that is: the kept state or the last checkpoint, and the same bits in the end."""
    put, claim = Store.put, KeptPlace.claim

    def cut_claim(*arguments: object) -> bool:
        if cut == "after the claim":
            claim(*arguments)
        if cut.endswith("the claim"):
            raise Cut
        return claim(*arguments)

    def cut_put(store: Store, name: str, chunks, size_bytes: int) -> None:
        when, _, file = cut.partition(" ")
        if "/keep/" not in store.url or name.rpartition("/")[2] != file:
            put(store, name, chunks, size_bytes)
            return
        if when != "before":
            data = b"".join(chunks())
            Path(store.url, name).parent.mkdir(exist_ok=True)
            Path(store.url, name).write_bytes(data[: len(data) // 2 if when == "inside" else None])
        raise Cut

    monkeypatch.setattr(KeptPlace, "claim", cut_claim)
    monkeypatch.setattr(Store, "put", cut_put)
    monkeypatch.setattr("threading.excepthook", lambda *_: None)
    die(tmp_path, 7)
    monkeypatch.undo()
    training = Training(tmp_path)
    assert training.began_at == (6 if cut == "after manifest.json" else 4)
    training.train()
    assert digests(tmp_path) == straight


def damage_flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def damage_cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def damage_remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_remove])
@pytest.mark.parametrize("every", [4, 1000])
def test_a_damaged_state_does_not_count(tmp_path, straight, caplog, damage, every):
    """The last checkpoint does, and where there is none the run begins anew."""
    die(tmp_path, 7, every=every)
    damage(next(kept_in(tmp_path).glob("step-*/model.safetensors")))
    training = Training(tmp_path, every=every)
    assert training.began_at == (4 if every == 4 else 0)
    training.train()
    assert digests(tmp_path) == straight


def test_a_place_that_others_can_touch_is_not_used(tmp_path, caplog):
    """Anybody may make a name in /dev/shm before harness does."""
    root = Path(kept.root_in(str(tmp_path / "keep")))
    root.mkdir(parents=True, mode=0o755)
    root.chmod(0o755)
    die(tmp_path, 7)
    assert "not kept, the last checkpoint counts: others can write to" in caplog.text
    root.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "elsewhere")
    die(tmp_path, 7)
    assert "is no directory; remove it" in caplog.text
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_place_of_another_user_is_not_used(tmp_path, monkeypatch, caplog):
    die(tmp_path, 7)
    uid = os.getuid()
    root = Path(kept.root_in(str(tmp_path / "keep")))
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    root.rename(kept.root_in(str(tmp_path / "keep")))
    assert Training(tmp_path).began_at == 4
    assert f"belongs to user {uid}" in caplog.text


def test_what_does_not_fit_is_not_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kept, "MEMORY", str(tmp_path))
    (tmp_path / "keep").mkdir()
    room = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((*room[:4], 2, *room[5:])))
    die(tmp_path, 7)
    assert "not kept, the last checkpoint counts: it has 0 MB" in caplog.text
    assert kept_steps(tmp_path) == []


@pytest.mark.parametrize("there", ["nowhere", "a file"])
def test_without_a_place_nothing_is_kept(tmp_path, caplog, there):
    """No /dev/shm: one line says so, and the end of the process is the same."""
    where = tmp_path / "nowhere"
    if there == "a file":
        where.touch()
    die(tmp_path, 7, keep=str(where))
    assert "cannot be made" in caplog.text
    assert Training(tmp_path, keep=str(where)).began_at == 4


def test_a_full_place(tmp_path, monkeypatch, caplog):
    put = Store.put

    def full(store: Store, name: str, chunks, size_bytes: int) -> None:
        if "/keep/" in store.url:
            raise StoreError(f"put {store.url}/{name}: No space left on device")
        put(store, name, chunks, size_bytes)

    monkeypatch.setattr(Store, "put", full)
    die(tmp_path, 7)
    assert "step 6 is not kept, the last checkpoint counts: put" in caplog.text
    assert Training(tmp_path).began_at == 4


# --- the will of the user --------------------------------------------------------------------------------------------


def delete_newest(folder: Path) -> None:
    shutil.rmtree(max((folder / "run").glob("step-*"), key=lambda each: each.name))


def delete_all(folder: Path) -> None:
    shutil.rmtree(folder / "run")


def delete_checkpoints(folder: Path) -> None:
    for each in (folder / "run").glob("step-*"):
        shutil.rmtree(each)


@pytest.mark.parametrize(("act", "began_at"), [(delete_newest, 4), (delete_all, 0), (delete_checkpoints, 0)])
def test_who_deletes_goes_back(tmp_path, act, began_at):
    """What is kept stands on a checkpoint that is not there any more."""
    die(tmp_path, 10)
    assert kept_steps(tmp_path) == [9]
    act(tmp_path)
    assert Training(tmp_path).began_at == began_at


# --- the end of a launch ---------------------------------------------------------------------------------------------


def test_what_is_kept_becomes_a_checkpoint(tmp_path, straight):
    """Where no rank of this machine goes on, the launcher copies it: a machine that has nothing continues from it."""
    die(tmp_path, 7)
    where = kept_in(tmp_path)
    assert carry(str(where), tells_of_save) == (6, str(tmp_path / "run"))
    assert not where.exists()
    assert CliRunner().invoke(cli, ["verify", str(tmp_path / "run")]).exit_code == 0
    training = Training(tmp_path, keep=None)
    assert training.began_at == 6
    training.train()
    assert digests(tmp_path) == straight


def test_who_has_gone_back_is_not_overruled_at_the_end_of_a_launch(tmp_path):
    """The newest checkpoint was deleted; or a later attempt has passed the step."""
    die(tmp_path, 10)
    delete_newest(tmp_path)
    assert carry(str(kept_in(tmp_path)), tells_of_save) is None
    assert kept_steps(tmp_path) == [9]
    Training(tmp_path, keep=None).train()
    assert carry(str(kept_in(tmp_path)), tells_of_save) is None


def test_a_run_that_takes_nothing_at_the_end_of_a_launch(tmp_path, capsys):
    """What is kept stays, and one line says what to do."""
    die(tmp_path, 7)
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").write_text("no directory")
    carry_and_tell(str(kept_in(tmp_path)), tells_of_save)
    assert re.search(
        r"could not be copied to the run \(.*\); start the same command on this machine", capsys.readouterr().err
    )
    assert kept_steps(tmp_path) == [6]


def test_a_copy_of_the_run_does_not_find_it(tmp_path, monkeypatch):
    """Also where both are given as a path that is relative; the original does."""
    monkeypatch.chdir(tmp_path)
    die(Path(), 7)
    shutil.copytree(tmp_path / "run", tmp_path / "copy" / "run")
    monkeypatch.chdir(tmp_path / "copy")
    assert Training(Path(), keep=str(tmp_path / "keep")).began_at == 4
    assert Training(tmp_path).began_at == 6


def test_a_rollback_goes_to_what_is_durable(tmp_path):
    """And takes what is kept away."""
    die(tmp_path, 7)
    training = Training(tmp_path, every=1000)
    assert training.began_at == 6
    training.run.roll_back()
    assert training.run.global_step == 4
    assert kept_steps(tmp_path) == []


def test_a_state_of_an_earlier_attempt_does_not_win(tmp_path):
    """A zombie keeps what it has after a newer attempt has committed more."""
    zombie = Training(tmp_path)
    with pytest.raises(Died):
        zombie.train(dying(7))
    shutil.move(kept_in(tmp_path), tmp_path / "aside")
    die(tmp_path, 10, keep=None)
    shutil.move(tmp_path / "aside", next((tmp_path / "keep").glob("harness-*"), None) or _root(tmp_path))
    assert Training(tmp_path).began_at == 8


def _root(folder: Path) -> Path:
    root = Path(kept.root_in(str(folder / "keep")))
    root.mkdir(mode=0o700, exist_ok=True)
    return root


# --- several machines, and what lies there ---------------------------------------------------------------------------


def test_copies_of_two_machines_must_be_the_same(tmp_path):
    """Or else none of them counts; of the same, every rank that has one can read it."""
    die(tmp_path, 7)
    catalog = Catalog(open_store(str(tmp_path / "run")))
    (entry,) = Catalog(open_store(str(kept_in(tmp_path)))).entries()
    counting, refused = kept.that_count(catalog, [[entry], [], [entry]], lambda *_: False)
    assert [each.holders for each in counting.values()] == [(0, 2)]
    assert not refused
    parts = {**entry.manifest.parts, "model": replace(entry.manifest.parts["model"], digest="xxh3_128:0")}
    other = replace(entry, manifest=replace(entry.manifest, parts=parts))
    counting, refused = kept.that_count(catalog, [[entry], [other]], lambda *_: False)
    assert (counting, *refused.values()) == ({}, "the machines have kept different states of this step")


@pytest.mark.parametrize(("tells", "told", "counts"), [(True, False, True), (True, True, False), (False, False, False)])
def test_a_save_of_which_there_is_no_trace(tmp_path, tells, told, counts):
    """It may have been committed and deleted since. The events say whether it can have been."""
    die(tmp_path, 7)
    catalog = Catalog(open_store(str(tmp_path / "run")))
    (entry,) = Catalog(open_store(str(kept_in(tmp_path)))).entries()
    about = {**kept.kept_of(entry), "saving": 5, "tells": tells}
    entry = replace(entry, manifest=replace(entry.manifest, meta={**entry.manifest.meta, "kept": about}))
    counting, _ = kept.that_count(catalog, [[entry]], lambda *_: told)
    assert bool(counting) == counts


def test_rubbish_of_other_runs_goes_after_a_week(tmp_path):
    """At the start of any run that keeps in the same place; what is younger stays."""
    die(tmp_path, 7)
    old, young = (kept_in(tmp_path).with_name(name) for name in ("000001-0000000a-b", "000001-0000000c-d"))
    for each, days in ((old, 8), (young, 6)):
        each.mkdir(mode=0o700)
        os.utime(each, (time.time() - 86400 * days,) * 2)
    assert Training(tmp_path).began_at == 6
    assert (old.exists(), young.exists()) == (False, True)


def test_clean_says_what_lies_there_and_deletes_it(tmp_path):
    die(tmp_path, 7)
    tried = CliRunner().invoke(cli, ["clean", str(tmp_path / "keep"), "--dry-run"])
    assert f"step 6 of {tmp_path / 'run'}" in tried.output
    assert tried.output.startswith("would delete")
    assert kept_steps(tmp_path) == [6]
    CliRunner().invoke(cli, ["clean", str(tmp_path / "keep"), "--older-than", "1"])
    assert kept_steps(tmp_path) == [6]
    done = CliRunner().invoke(cli, ["clean", str(tmp_path / "keep"), "--json"])
    assert [each["steps"] for each in json.loads(done.output)] == [[6]]
    assert list((tmp_path / "keep").iterdir()) == []


def test_clean_looks_beside_runs_that_delete_their_own(tmp_path):
    """What goes at this moment is nothing to tell of, and no error."""
    root = Path(kept.root_in(str(tmp_path)))
    with ThreadPoolExecutor() as pool:
        looks = pool.submit(lambda: [kept.left_in(str(tmp_path)) for _ in range(5_000)])
        while not looks.done():
            root.mkdir(mode=0o700)
            (root / "run").mkdir(mode=0o700)
            (root / "run" / "claim-000001-0000000a-6").touch()
            shutil.rmtree(root / "run")
            root.rmdir()  # as the last run does that has kept something
    assert {len(each) for each in looks.result()} <= {0, 1}


class Awaited(torch.Tensor):
    """A number of a device: who asks for it waits until the device is there."""

    asked = 0

    def item(self):
        Awaited.asked += 1
        return super().item()


def test_a_gradient_scaler_is_not_waited_for(tmp_path):
    """A boundary notes where its scale is, and asks for it only when that is kept."""
    model, scaler = nn.Linear(4, 1), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    (tmp_path / "keep").mkdir()
    config = {"log": {"every_steps": None}, "checkpoint": {"keep": str(tmp_path / "keep")}}
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run(str(tmp_path / "run"), state, every_steps=1000, stop=StopRequest(), config=config)
    with contextlib.closing(run):
        before = 0
        for step in run.steps(10):
            assert step < 2 or Awaited.asked == before
            scaler.scale(model(torch.ones(1, 4)).sum()).backward()
            scaler._scale = scaler._scale.as_subclass(Awaited)
            if step == 3:
                scaler.update(1.0)
                run.remember_crash(Died())
                break
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            before = Awaited.asked
            run.step()
    assert kept_steps(tmp_path) == [3]
    store = open_store(str(kept_in(tmp_path)))
    (entry,) = Catalog(store).entries()
    found = load.read(store, entry.directory, entry.manifest)["scaler"]["state"]
    assert found == {**scaler.state_dict(), "scale": 64.0, "_growth_tracker": 0}
    assert Awaited.asked > before
