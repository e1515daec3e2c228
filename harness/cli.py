"""The command line: verbs, each a few lines over a library call.

The verbs that read a run's URL import neither torch nor the user's code, and need no GPU.
"""

import dataclasses
import io
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

import harness
from harness.errors import ConfigError, Corrupt, HarnessError, NoCheckpoint, RankFailure
from harness.launcher import outcome
from harness.launcher.outcome import Outcome
from harness.runtime import console
from harness.runtime.environment import is_first_of_node, is_under_torchrun, rank, ranks, restarts
from harness.runtime.escapes import for_terminal
from harness.secrecy import scrubbed

if TYPE_CHECKING:
    from harness.checkpoint.catalog import Catalog, Entry
    from harness.checkpoint.format import Manifest
    from harness.config import Config
    from harness.doctor.findings import Finding
    from harness.task import Task

Function = Callable[..., Any]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(harness.__version__)
def cli() -> None:
    """Keep PyTorch training alive: checkpoints that are whole or absent, and exact resumes."""


def main() -> NoReturn:
    """Runs the command line. What a user did wrong gets one line; what we did wrong, a traceback."""
    end = console.begin()
    try:
        _run()
    except HarnessError as error:
        if is_first_of_node():
            console.report_error(error, for_all=True)
        outcome.record_outcome(outcome.of(error))  # after the words: once it is there, the launcher may end this rank
        if not is_first_of_node():
            time.sleep(1)  # torchrun ends all ranks when the first one goes: the one that speaks must get to it
        sys.exit(error.exit_code)
    except click.ClickException as error:
        words = io.StringIO()
        error.show(words)
        console.print_error(words.getvalue())
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        console.report_error(error)
        sys.exit(1)
    finally:
        end()
    sys.exit(0)


def _run() -> None:
    try:
        cli.main(standalone_mode=False)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "torch":
            raise ConfigError(f"{error}: PyTorch is needed; install it for {sys.executable}: pip install torch") from error
        raise


# --- train -----------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("config_file", metavar="CONFIG.yaml")
@click.argument("overrides", metavar="[dotted.key=value]...", nargs=-1)
@click.option("--fresh", is_flag=True, help="Refuse a checkpoint.url that already holds a run, instead of resuming it.")
@click.option("--resume", is_flag=True, help="Refuse a checkpoint.url that holds no run, instead of starting one.")
def train(config_file: str, overrides: tuple[str, ...], fresh: bool, resume: bool) -> None:
    """Train, from the newest whole checkpoint if the run has one.

    Runs under torchrun or as one plain process, with the same configuration. Exit codes: 0 done; 2 the configuration or
    the model does not fit; 65 or 66 the run's checkpoints are corrupt; 70 a crash loop, or a loss that is not finite; 74 the
    storage fails; 75 stopped and saved, start it again; 76 a rank failed; 77 a newer attempt trains this run; 1 anything
    else, with a traceback.
    """
    from harness.config import load_config  # noqa: PLC0415
    from harness.training import program  # noqa: PLC0415  # see the module's docstring

    program.begin()
    with program.Program() as process:  # before torch is imported, which takes seconds
        _check_ranks()
        config = load_config(config_file, (*overrides, "checkpoint.must_exist=true") if resume else overrides)
        task = _build_task(config)
        process.grace_seconds = config.stop.grace_seconds
        from harness.distributed.world import join_world  # noqa: PLC0415
        from harness.training import loop  # noqa: PLC0415  # see the module's docstring

        world = join_world(config.world)
        with program.ending(world):
            loop.train(config, task, world, process.stop, fresh=fresh)


def _check_ranks() -> None:
    """Raises ``ConfigError`` where the launcher has started something else than ranks; any of them may be the wrong one."""
    try:
        ranks()
    except ConfigError as mistake:
        if not is_first_of_node():  # or else it is told of at the end
            console.report_error(mistake)
        raise


def _build_task(config: "Config") -> "Task":
    """Everything that can be wrong with the configuration is found here, before the ranks meet."""
    from harness.storage.store import open_store  # noqa: PLC0415  # see the module's docstring
    from harness.task import find_builder, package_of  # noqa: PLC0415

    console.hear(package_of(config.task))
    builder = find_builder(config.task, config.args)
    if config.checkpoint.url is not None:
        open_store(config.checkpoint.url, config.checkpoint.storage_options)
    from harness.training.loop import build_task  # noqa: PLC0415  # torch is imported only once the task is known to exist

    return build_task(config, builder)


class _Halves(click.Command):
    """Has "--" among its arguments: click takes it away otherwise, and with it where the program begins."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--", *args] if "--" in args else args)


class _OwnOptionsFirst(click.Command):
    """Likewise, for a command with options of its own before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        start = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [*args[:start], *(["--"] if start < len(args) else []), *args[start:]])


@cli.command(cls=_Halves, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def launch(arguments: tuple[str, ...]) -> None:
    """Run `harness train`, `harness doctor` or a script with a harness.Run under torchrun.

    harness launch [torchrun options, own options] -- train CONFIG.yaml ... (or doctor CONFIG.yaml, SCRIPT.py, -m MODULE).
    Sets what torchrun needs to restart well, forks the ranks from a process that has imported torch, and ends torchrun when
    a restart cannot help. What torchrun prints about itself goes to a file, which the last line names where the ranks have
    failed. Own options: --preload MODULE, as often as you like, has that process import a module of yours, too;
    --suspended-seconds N kills a rank that has been suspended (SIGSTOP) for so long (60; 0: never); --verbose prints what
    torchrun says. Exit codes: 0 done; 75 stopped and saved, start it again; 1, 74, 76 failed, a restart may help; 2, 65,
    66, 70, 77 as for train, somebody has to act first.
    """
    from harness.launcher.launch import halves, launch  # noqa: PLC0415  # see the module's docstring

    sys.exit(launch(*halves(arguments), carry=_carry))


def _carry(path: str) -> None:
    """Takes what a rank has kept on this machine to its run."""
    from harness.checkpoint.carry import carry_and_tell  # noqa: PLC0415  # see the module's docstring
    from harness.telemetry.journal import tells_of_save  # noqa: PLC0415

    carry_and_tell(path, tells_of_save)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("what", metavar="CONFIG.yaml")
@click.argument("arguments", metavar="[dotted.key=value]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--fresh", is_flag=True, help="Report a checkpoint.url that already holds a run, as train --fresh does.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(what: str, arguments: tuple[str, ...], fresh: bool, as_json: bool) -> None:
    """Find what would break a run on this machine and with this launcher, before it starts.

    Start it as you will start the training: harness launch [torchrun options] -- doctor CONFIG.yaml ...
    It tries what it can, and leaves nothing behind. In place of CONFIG.yaml it takes SCRIPT.py, or -m MODULE, with
    arguments. It runs the script until that makes its harness.Run. Put the script's arguments after -- if they are named
    like the doctor's.

    Exit codes: 0 the run would work, perhaps with warnings. Otherwise the code with which the run would end: 2 the
    configuration, the task, the script, the machine, or a checkpoint of another model; 66 no checkpoint is whole; 70 a crash
    loop; 74 the storage fails; 76 the ranks do not meet.
    """
    from harness.doctor import examine, examine_script  # noqa: PLC0415
    from harness.runtime.signals import STOP_SIGNALS  # noqa: PLC0415
    from harness.training import program  # noqa: PLC0415  # see the module's docstring

    if restarts():
        raise RankFailure(
            "the doctor has reported already (see above), and torchrun started it again; use harness launch, which does not"
        )
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)  # each ends it as ^C does, with everything cleaned up
    program.begin()
    _check_ranks()

    def emit(found: "Sequence[Finding]") -> None:
        _print_findings(found, as_json=as_json)

    if what == "-m" or what.endswith(".py"):
        _leave_doctor(examine_script((what, *arguments), emit, _leave_doctor, fresh=fresh), at_once=is_under_torchrun())
    _leave_doctor(examine(what, arguments, emit, fresh=fresh), at_once=is_under_torchrun())


@cli.command(cls=_OwnOptionsFirst, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--quick", is_flag=True, help="Three deaths instead of all.")
@click.option("--soak", "soak_minutes", type=float, default=0.0, help="Go on with random deaths for some MINUTES.")
@click.option("--seed", type=int, help="Which random deaths those are; by default another seed each time, which is printed.")
@click.option("--steps", type=click.IntRange(min=8), default=20, show_default=True, help="Steps of each run.")
@click.option("--every-steps", type=click.IntRange(min=2), default=5, show_default=True, help="Steps between two saves.")
@click.option("--url", help="Where the runs are saved; by default in a temporary folder, which is deleted.")
@click.option("--page", "page_path", metavar="OUT.html", help="Write a page with the same, and the curves of the losses.")
@click.option("--between-deaths", "hours", type=float, default=8.0, show_default=True, help="HOURS that the job lives.")
@click.option("--patience", type=float, default=300.0, show_default=True, help="SECONDS without a step: the job hangs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def drill(
    arguments: tuple[str, ...],
    quick: bool,
    soak_minutes: float,
    seed: int | None,
    steps: int,
    every_steps: int,
    url: str | None,
    page_path: str | None,
    hours: float,
    patience: float,
    as_json: bool,
) -> None:
    """Kill your own job in every way that we know, and say whether it survives and is exact.

    harness drill CONFIG.yaml [dotted.key=value]..., or harness drill [torchrun options] -- SCRIPT.py [arguments]. It runs
    the unchanged job for some dozen steps, again and again, in a folder of its own, and compares each step with a run that
    nobody killed. Exit codes: 0 the job survives and is exact, 79 it survives and is not exact, 1 it does not survive, or
    fails by itself.
    """
    from harness.drill.command import run_drill  # noqa: PLC0415  # see the module's docstring

    sys.exit(
        run_drill(
            arguments,
            quick=quick,
            soak_seconds=60 * soak_minutes,
            seed=seed,
            steps=steps,
            every_steps=every_steps,
            url=url,
            page_path=page_path,
            between_deaths_seconds=3600 * hours,
            patience_seconds=patience,
            as_json=as_json,
        )
    )


def _leave_doctor(code: int, *, at_once: bool = True) -> NoReturn:
    """Ends the doctor; at once where a script is under way, none of whose own endings is to be run."""
    if not at_once:
        sys.exit(code)
    from harness.distributed.world import leave_at_once  # noqa: PLC0415  # see the module's docstring

    sys.stdout.flush()
    sys.stderr.flush()
    if is_under_torchrun():
        outcome.record_outcome(Outcome(code, verdict=True))
    leave_at_once(
        0 if is_under_torchrun() and outcome.is_wanted() else code
    )  # torchrun would start again what ends with anything else


def _print_findings(found: "Sequence[Finding]", *, as_json: bool) -> None:
    if rank():
        return
    if as_json:
        click.echo(json.dumps(scrubbed([dataclasses.asdict(finding) for finding in found]), indent=1))
        return
    for finding in found:
        click.echo(console.printable(str(finding)))


# --- reading a run ---------------------------------------------------------------------------------------------------


def _reads_run(function: Function) -> Function:
    """The argument and the options of every verb that reads a run's URL."""
    storage = click.option(
        "-o",
        "--storage-option",
        "storage_options",
        metavar="KEY=VALUE",
        multiple=True,
        help="Passed to the fsspec filesystem, as checkpoint.storage_options is; the value is YAML.",
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return click.argument("url")(storage(as_json(function)))


def _open_catalog(url: str, storage_options: tuple[str, ...]) -> "Catalog":
    from harness.checkpoint.catalog import Catalog  # noqa: PLC0415  # see the module's docstring
    from harness.config import parse_overrides  # noqa: PLC0415
    from harness.storage.store import open_store  # noqa: PLC0415

    return Catalog(open_store(url, parse_overrides(storage_options, may_be_secret=True)))


_LISTED = 50  # a run may have thousands, and each is looked into


@cli.command()
@_reads_run
@click.option(
    "--last", type=click.IntRange(min=1), help=f"Number of the latest saves to list; by default {_LISTED}, with --json all."
)
def ls(url: str, storage_options: tuple[str, ...], as_json: bool, last: int | None) -> None:
    """List the saves of a run: whole, corrupt, unfinished, abandoned (on a line that the run has left), or base (deleted,
    but for files of later checkpoints).

    The latest attempt comes first, and within it the latest step. Exit code 66 if there is no run at all.
    """
    from harness.checkpoint.catalog import line, shared_files  # noqa: PLC0415  # see the module's docstring

    catalog = _open_catalog(url, storage_options)
    last = last or (None if as_json else _LISTED)
    entries = catalog.entries(last)
    _refuse_nothing(catalog, entries)
    in_line = {entry.directory for entry in line(entries)}
    if as_json:
        click.echo(json.dumps([{**_summary(entry), "in_line": entry.directory in in_line} for entry in entries], indent=1))
        return
    if not entries:
        click.echo("no checkpoints")
    shared = shared_files(entries)
    for entry in entries:
        about = entry.manifest
        state = "abandoned" if entry.state == "whole" and entry.directory not in in_line else entry.state
        what = f"epoch {about.meta.get('epoch')}  {_size(about)}  {about.created}" if about else ""
        if entry.state == "base":
            what = f"{sum(shared[entry.directory].values()) / 1e6:.1f} MB of later checkpoints"
        _print(f"{state:<10}  step {entry.step:<10} {what}  {entry.directory}  {entry.problem}".rstrip())
    if len(entries) == last:
        click.echo(f"the latest {last}; --last lists more")


def _size(manifest: "Manifest") -> str:
    """How much a checkpoint has itself, and with others."""
    own_bytes = manifest.bytes - manifest.shared_bytes
    more = f" + {manifest.shared_bytes / 1e6:.1f} MB shared" if manifest.bases else ""
    return f"{own_bytes / 1e6:.1f} MB{more}"


def _print(line: str) -> None:
    """Prints a line with text out of a run's URL."""
    click.echo(for_terminal(line))


def _refuse_nothing(catalog: "Catalog", entries: "Sequence[Entry]") -> None:
    """Raises ``NoCheckpoint`` for a URL where no run has ever begun: it is mistyped, more often than not."""
    if not entries and not catalog.attempts.all():
        raise NoCheckpoint(f"{catalog.store.url}: no run has ever started here; check the URL for a typo")


@cli.command()
@_reads_run
@click.option("--step", type=int, help="Take the checkpoint of this step instead of the newest whole one.")
@click.option("--digest", "whole", is_flag=True, help="Read sharded parts, for digests that are equal in every layout.")
def inspect(url: str, storage_options: tuple[str, ...], as_json: bool, step: int | None, whole: bool) -> None:
    """Show what a checkpoint holds, from its manifest alone."""
    catalog = _open_catalog(url, storage_options)
    entry = catalog.newest(step)
    assert entry.manifest is not None, "a whole checkpoint has a manifest"
    digests = {name: part.digest for name, part in entry.manifest.parts.items()}
    if whole and any(part.boxes for part in entry.manifest.parts.values()):
        from harness.checkpoint.load import digests as digests_of_wholes  # noqa: PLC0415  # it imports torch
        from harness.interchange.disk_memory import on_disk  # noqa: PLC0415  # likewise

        digests = digests_of_wholes(catalog.store, entry.directory, entry.manifest, on_disk)
    details = {
        **_summary(entry),
        "digest": digests,
        "files": [dataclasses.asdict(file) for file in entry.manifest.files],
        "lineage": [dataclasses.asdict(ancestor) for ancestor in entry.manifest.lineage],
    }
    if as_json:
        click.echo(json.dumps(details, indent=1))
        return
    for key, value in details.items():
        if isinstance(value, list):
            _print(f"{key}:")
            for item in value:
                _print("  " + "  ".join(str(field) for field in (item.values() if isinstance(item, dict) else [item])))
        elif isinstance(value, dict):
            _print(f"{key}:")
            for name, item in value.items():
                _print(f"  {name}  {item}")
        else:
            _print(f"{key}: {value}")


@cli.command()
@_reads_run
@click.option("--step", type=int, help="Only the checkpoints of this step.")
@click.option("--deep", is_flag=True, help="Read every byte and compare it with the checksums.")
def verify(url: str, storage_options: tuple[str, ...], as_json: bool, step: int | None, deep: bool) -> None:
    """Check the checkpoints of a run: manifests and sizes, with --deep every byte.

    Exit codes: 0 all are whole; 65 some are corrupt; 66 there is none.
    """
    from harness.checkpoint.catalog import verify_all  # noqa: PLC0415  # see the module's docstring

    entries = verify_all(_open_catalog(url, storage_options), step=step, deep=deep)
    if as_json:
        click.echo(json.dumps([_summary(entry) for entry in entries], indent=1))
    else:
        for entry in entries:
            _print(f"{entry.state:<10}  step {entry.step:<10} {entry.directory}  {entry.problem}".rstrip())
    if not entries:
        raise NoCheckpoint(f"{url}: there is no checkpoint to verify")
    corrupt = [entry for entry in entries if entry.state == "corrupt"]
    if corrupt:
        raise Corrupt(f"{url}: {len(corrupt)} of {len(entries)} checkpoints are corrupt")


@cli.command()
@_reads_run
@click.option(
    "--keep-last", type=click.IntRange(min=1), required=True, help="Number of the newest whole checkpoints to keep."
)
@click.option(
    "--keep-every-steps", type=click.IntRange(min=1), help="Also keep checkpoints whose step is a multiple of this."
)
@click.option(
    "--unfinished", is_flag=True, help="Also delete unfinished saves of the last attempt. Make sure that it is dead."
)
@click.option("--dry-run", is_flag=True, help="Print what would be deleted, and delete nothing.")
def prune(
    url: str,
    storage_options: tuple[str, ...],
    as_json: bool,
    keep_last: int,
    keep_every_steps: int | None,
    unfinished: bool,
    dry_run: bool,
) -> None:
    """Delete old checkpoints and unfinished saves. The newest whole checkpoint always stays.

    For a run that is not training. A running one deletes by itself (checkpoint.keep_last).
    """
    from harness.checkpoint.catalog import line  # noqa: PLC0415  # see the module's docstring
    from harness.checkpoint.retention import Pruner, Retention  # noqa: PLC0415

    retention = Retention(keep_last, keep_every_steps)
    catalog = _open_catalog(url, storage_options)
    gone = Pruner(catalog).prune(retention, dry_run=dry_run, unfinished=unfinished)
    _refuse_nothing(catalog, gone)
    if as_json:
        click.echo(json.dumps([_summary(entry) for entry in gone], indent=1))
        return
    for entry in gone:
        _print(f"{'would delete' if dry_run else 'deleted'}  {entry.state:<10}  {entry.directory}")
    went = {entry.directory for entry in gone}
    there = catalog.entries(without=went)
    in_line = {entry.directory for entry in line(there)}
    for entry in there:
        if entry.state == "unfinished":
            what = "the last attempt may still be writing it; if it is dead, --unfinished deletes it"
            _print(f"stays  unfinished  {entry.directory}  {what}")
        elif entry.state == "whole" and entry.directory not in in_line:
            _print(f"stays  abandoned  {entry.directory}  it is newer than the checkpoints that the run continues")


@cli.command()
@click.argument("directory", default="/dev/shm")  # noqa: S108  # where runs keep states by themselves
@click.option("--older-than", "days", type=float, default=0.0, help="Only what is older than this many DAYS.")
@click.option("--dry-run", is_flag=True, help="Print what would be deleted, and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def clean(directory: str, days: float, dry_run: bool, as_json: bool) -> None:
    """Delete the states that your runs have kept on this machine, in its memory or in the DIRECTORY of checkpoint.keep.

    For runs that are to go on from their last checkpoint, or not at all. A run deletes its own, and what others have left
    for a week.
    """
    from harness.checkpoint import kept  # noqa: PLC0415  # see the module's docstring

    found = [each for each in kept.left_in(directory) if each.age_seconds >= 86400 * days]
    for each in found if not dry_run else ():
        kept.remove(each)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(each) for each in found], indent=1))
        return
    for each in found:
        steps = f"step {', '.join(map(str, each.steps))} of {each.url}" if each.steps else "nothing whole"
        verb = "would delete" if dry_run else "deleted"
        _print(f"{verb}  {each.bytes / 1e6:.1f} MB  {each.age_seconds / 3600:.1f} h old  {steps}  {each.path}")


@cli.command()
@_reads_run
@click.argument("out")
@click.option("--step", type=int, help="Take the checkpoint of this step instead of the newest whole one.")
@click.option("--part", default="model", help="Name of the model in the state of your own loop.", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace an existing OUT.")
def export(
    url: str, out: str, storage_options: tuple[str, ...], as_json: bool, step: int | None, part: str, overwrite: bool
) -> None:
    """Write the model of a checkpoint alone, every byte verified.

    OUT is NAME.safetensors, or NAME.pth for model.load_state_dict(torch.load(OUT, weights_only=True)), or NAME/ for a
    directory in Hugging Face's layout.
    """
    from harness.interchange import export_model  # noqa: PLC0415  # see the module's docstring

    catalog = _open_catalog(url, storage_options)

    def write(entry: "Entry") -> tuple["Entry", dict[str, int]]:
        assert entry.manifest is not None, "a whole checkpoint has a manifest"
        return entry, export_model(catalog.store, entry.directory, entry.manifest, out, part=part, overwrite=overwrite)

    entry, written = catalog.reading(write, step)
    if as_json:
        click.echo(json.dumps({"directory": entry.directory, "step": entry.step, "files": written}, indent=1))
        return
    for name, size_bytes in written.items():
        _print(f"{name}  {size_bytes / 1e6:.1f} MB  (step {entry.step})")


@cli.command()
@_reads_run
@click.argument("out", required=False, metavar="[OUT.html]")
@click.option("--metrics", is_flag=True, help="Print the metrics of each step instead, once, as JSON lines.")
def report(url: str, out: str | None, storage_options: tuple[str, ...], as_json: bool, metrics: bool) -> None:
    """Report what became of a run: goodput, deaths, recoveries, saves, fallbacks, stragglers.

    Prints half a page. OUT.html is a page with the loss curve and a time line, which needs no network.
    """
    from harness.report import numbers, page, words  # noqa: PLC0415
    from harness.telemetry import journal  # noqa: PLC0415  # see the module's docstring

    catalog = _open_catalog(url, storage_options)
    if metrics:
        told = journal.Told(catalog.store)
        for record in journal.merged(told, numbers.newest_lineage(catalog)):
            click.echo(json.dumps(record))
        if told.unreadable:
            count = f"{told.unreadable} line{'s' * (told.unreadable > 1)}"
            click.echo(f"harness: {count} could not be read", err=True)
        return
    records = journal.read_records(catalog.store, most=numbers.MOST_RECORDS)
    found = numbers.read_report(catalog, records, time.time())
    if out is not None:
        page.write(out, page.page(found, records))
    click.echo(json.dumps(found.as_json(), indent=1) if as_json else words.short(found))


@cli.command(name="import")
@click.argument("src")
@_reads_run
@click.option("--trust", is_flag=True, help="Read a torch.distributed.checkpoint directory. Its metadata can run code.")
def import_(src: str, url: str, storage_options: tuple[str, ...], as_json: bool, trust: bool) -> None:
    """Write weights of other programs as the first checkpoint of a new run at URL, for init_from.

    SRC is a .pth with a state_dict (alone or in one of the usual dictionaries), safetensors in one or several files, or with
    --trust a directory of torch.distributed.checkpoint.
    """
    from harness.interchange import import_run  # noqa: PLC0415  # see the module's docstring

    directory, foreign = import_run(src, _open_catalog(url, storage_options).store, trust=trust)
    if as_json:
        click.echo(json.dumps({"directory": directory, "what": foreign.what, "entries": len(foreign.model)}, indent=1))
    else:
        _print(f"{directory}  {len(foreign.model)} entries of the model, from {foreign.what}")


def _summary(entry: "Entry") -> dict[str, Any]:
    known: dict[str, Any] = {
        "directory": entry.directory,
        "state": entry.state,
        "step": entry.step,
        "attempt": entry.attempt.id,
    }
    if entry.problem:
        known["problem"] = entry.problem
    if entry.manifest is not None:
        manifest = entry.manifest
        known |= {"created": manifest.created, "bytes": manifest.bytes, "shared_bytes": manifest.shared_bytes}
        known |= {key: value for key, value in entry.manifest.meta.items() if key not in _OWN_KEYS}
    return known


_OWN_KEYS = {
    *("directory", "state", "step", "attempt", "problem", "created", "bytes", "shared_bytes"),
    *("in_line", "digest", "files", "lineage"),
}
