"""What lies in ``launch/`` for clusters that cannot be had here: held against the real schemas, read by the programs that it
names, and its command lines run as processes, with what the cluster would do to them.

``tests/system/test_slurm.py`` has Slurm, which can be had.
"""

import contextlib
import importlib
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from harness.cli import cli
from harness.config import StopConfig, load_config
from harness.launcher import outcome
from harness.launcher.launch import _DEFAULTS, command
from tests.support import kubelet
from tests.support.cluster import Run, environment, launch, newest, path_with_harness
from tests.support.hosts import hosts, what_is_missing
from tests.support.kubelet import evict, job, only_container, pods, verdict
from tests.support.slow_task import MOST_STEPS, TASK

REPOSITORY = Path(__file__).parents[2]
SKYPILOT = REPOSITORY / "launch" / "skypilot.yaml"
SKYPILOT_PACKAGE = REPOSITORY / "build" / "skypilot"  # where CI puts it
TORCHX = REPOSITORY / "build" / "torchx" / "bin" / "torchx"
PAGE = (REPOSITORY / "docs" / "guides" / "launching.md").read_text()
LAUNCHERS = sorted(path for path in (REPOSITORY / "launch").rglob("*.*") if path.suffix in (".yaml", ".sh", ".sbatch"))
CODES = {*outcome.FINAL_EXIT_CODES, 75, 1, 74, 76, 137}

MODELS = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}


# --- what their readers know -----------------------------------------------------------------------------------------


def refuse(document: dict, versions: tuple[str, ...] = ("1.37",)) -> None:
    """Raises an error for a resource that is not as its schema, or its model, has it."""
    if model := MODELS.get(document["kind"]):
        known = model.from_dict(document).to_dict()
        if known != document:  # models leave out what they do not know
            raise ValueError(document)
        return
    for version in versions:
        kubernetes_validate.validate(document, version, strict=True)


def resources() -> list[dict]:
    """All resources, and the Jobs that JobSet and Trainer make of theirs."""
    found = [document for file in kubelet.FILES for document in kubelet.documents(file).values()]
    return [*found, job("jobset.yaml"), job("trainjob.yaml")]


def mappings(value: object) -> Iterator[dict]:
    """All mappings in a document whose keys are not the user's to choose."""
    if isinstance(value, dict):
        yield value
        for key, inner in value.items():
            if key not in ("labels", "limits", "selector"):
                yield from mappings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from mappings(inner)


def test_kubernetes_resources_are_as_their_schemas_have_them():
    """In all versions that have what the files use."""
    for document in resources():
        refuse(document, ("1.33", "1.34", "1.35", "1.36", "1.37"))


def test_a_key_that_kubernetes_does_not_know_would_be_noticed():
    """Wherever it stands."""
    for document in resources():
        inner = [found for found in mappings(document) if found != {}]  # torch: {} is free in the models
        assert len(inner) > 3
        for mapping in inner:
            mapping["kubernets"] = "x"
            with pytest.raises((ValueError, jsonschema.ValidationError)):
                refuse(document)
            del mapping["kubernets"]


def skypilot(module: str) -> types.ModuleType:
    """A module of SkyPilot's, without the hundred packages that importing all of it needs."""
    if not SKYPILOT_PACKAGE.exists():
        pytest.skip("needs SkyPilot in build/skypilot: see .ci/run")
    for name in ("sky", "sky.utils", "sky.skylet", "sky.setup_files"):
        package = sys.modules.setdefault(name, types.ModuleType(name))
        package.__path__ = [str(SKYPILOT_PACKAGE / name.replace(".", "/"))]
    sys.modules["sky"].__version__ = "0.14.1"
    autostop = types.ModuleType("sky.skylet.autostop_lib")  # for when a machine is idle
    autostop.AutostopWaitFor = types.SimpleNamespace(supported_modes=list)
    sys.modules["sky.skylet"].autostop_lib = sys.modules[autostop.__name__] = autostop
    return importlib.import_module(module)


@pytest.fixture
def schemas(monkeypatch):
    module = skypilot("sky.utils.schemas")
    monkeypatch.setattr(module, "_task_config_schema", dict)  # the section `config`, which needs its server
    return module


def test_skypilots_task_is_as_its_schema_has_it(schemas):
    task = yaml.safe_load(SKYPILOT.read_text())
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    recovery = schemas.get_resources_schema()["properties"]["job_recovery"]["anyOf"][1]["properties"]
    assert task["resources"]["job_recovery"].keys() <= recovery.keys()
    for wrong in (task | {"num_node": 2}, task | {"num_nodes": "2"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schemas.get_task_schema())


def test_skypilot_knows_what_the_task_counts_on(schemas):
    """The strategy, and every variable that the script reads."""
    task = yaml.safe_load(SKYPILOT.read_text())
    strategies = (SKYPILOT_PACKAGE / "sky" / "jobs" / "recovery_strategy.py").read_text()
    assert f"name='{task['resources']['job_recovery']['strategy']}'" in strategies
    names = {value for value in vars(skypilot("sky.skylet.constants")).values() if isinstance(value, str)}
    read = set(re.findall(r"\$\(?\(?\{?([A-Z][A-Z_]+)", task["run"]))
    assert read - task["envs"].keys() <= names
    assert len(read) > len(task["envs"])


# --- what a server would say, and the codes --------------------------------------------------------------------------


@pytest.mark.parametrize("file", kubelet.FILES)
def test_a_job_is_one_that_a_server_takes(file):
    """What the schemas leave open: words out of a list, and what must fit together."""
    made = job(file)
    spec, pod, container = made["spec"], made["spec"]["template"]["spec"], only_container(made)
    assert (spec["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    assert spec.get("podReplacementPolicy", "Failed") == "Failed"
    assert spec["completions"] == spec["parallelism"] > 1
    assert ("backoffLimitPerIndex" in spec) == ("maxFailedIndexes" in spec) != ("backoffLimit" in spec)
    assert len(f"{made['metadata']['name']}-{spec['completions'] - 1}") <= 63
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("FailJob", "FailIndex", "Ignore", "Count")
        if codes := rule.get("onExitCodes"):
            assert codes["operator"] in ("In", "NotIn")
            assert codes["containerName"] == container["name"]
            assert codes["values"] == sorted(set(codes["values"]) - {0})
    for toleration in pod.get("tolerations", []):
        assert (toleration["operator"], toleration["effect"]) == ("Exists", "NoExecute")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("file", kubelet.FILES)
def test_there_is_time_to_save(file):
    """The pod outlives torchrun's time to save, and that the ranks'."""
    granted = job(file)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert granted >= int(_DEFAULTS["--shutdown-timeout"]) + 10
    assert int(_DEFAULTS["--shutdown-timeout"]) > StopConfig().grace_seconds
    assert f"SIGKILL {granted} s later" in " ".join((kubelet.DIRECTORY / file).read_text().replace("\n#", "").split())


def test_what_a_job_does_about_an_exit_code():
    """No restart where none can help; a stop is free, and so is an eviction, however it ended; the rest is counted."""
    made = job("job.yaml")
    for code in CODES:
        expected = "FailJob" if code in outcome.FINAL_EXIT_CODES else "Ignore" if code == 75 else "Count"
        assert verdict(made, code)[0] == expected, code
        assert verdict(made, code, evicted=True)[0] == ("FailJob" if expected == "FailJob" else "Ignore"), code


@pytest.mark.parametrize(("file", "kind"), [("jobset.yaml", "JobSet"), ("trainjob.yaml", "TrainingRuntime")])
def test_what_a_jobset_does_about_an_exit_code(file, kind):
    """The same, by way of the Job's failure."""
    spec = kubelet.documents(file)[kind]["spec"]
    policy = spec.get("template", {"spec": spec})["spec"]["failurePolicy"]
    assert job(file)["spec"]["backoffLimit"] == 0
    assert policy["maxRestarts"] > 0
    assert all(re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]) for rule in policy["rules"])

    def does(code: int, *, evicted: bool = False) -> str:
        action, message = verdict(job(file), code, evicted=evicted)
        reason = {"FailJob": "PodFailurePolicy", "Count": "BackoffLimitExceeded"}[action]
        for rule in policy["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
        return "RestartJobSet"

    free = "RestartJobSetAndIgnoreMaxRestarts"
    for code in CODES:
        expected = "FailJobSet" if code in outcome.FINAL_EXIT_CODES else free if code == 75 else "RestartJobSet"
        assert does(code) == expected, code
        assert does(code, evicted=True) == (expected if expected == "FailJobSet" else free), code


def test_what_skypilot_does_about_an_exit_code():
    """75 is always started again; 137, which it gives those that it kills itself, must not be."""
    recovery = yaml.safe_load(SKYPILOT.read_text())["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [75]
    assert recovery["max_restarts_on_errors"] > 0


def test_the_pods_of_a_job_find_each_other():
    """The Service is headless, has the name that pods give as their domain, and selects them. JobSet makes one by itself."""
    service, made = kubelet.documents("job.yaml")["Service"], job("job.yaml")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["metadata"]["name"] == made["spec"]["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": made["metadata"]["name"]}
    options = dict(word.partition("=")[::2] for word in said("job.yaml") if word.startswith("--"))
    assert options["--rdzv-endpoint"].endswith(f":{service['spec']['ports'][0]['port']}")


# --- their command lines ---------------------------------------------------------------------------------------------


def said(file: str, place: Path | None = None, index: int = 0, attempt: int = 0) -> list[str]:
    """The words with which the shell of a file calls ``harness``."""
    if file == SKYPILOT.name:
        task = yaml.safe_load(SKYPILOT.read_text())
        words, env = ["bash", "-c", task["run"]], task["envs"] | skypilot_env(index)
    else:
        words, env = kubelet.command(job(file), index, attempt)
    function = 'harness() { printf "%s\\0" "$@"; }\n'  # exec does not know functions
    words = [function + word.replace("exec harness", "harness") if "harness launch" in word else word for word in words]
    done = subprocess.run(words, env={**environment(), **env}, check=True, capture_output=True, text=True)
    return done.stdout.split("\0")[:-1]


def skypilot_env(rank: int) -> dict[str, str]:
    ips = "10.77.0.1\n10.77.0.2\n"
    return {
        "SKYPILOT_NODE_IPS": ips,
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_TASK_ID": "sky-1",
    }


@pytest.mark.parametrize("file", [*kubelet.FILES, SKYPILOT.name])
def test_a_command_line_is_one_that_its_programs_take(file, monkeypatch):
    """torchrun's options by torchrun's own parser, harness's by its own, and the configuration is there."""
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous
    from torch.distributed.run import get_args_parser

    monkeypatch.chdir(REPOSITORY)
    if file == "trainjob.yaml":
        for name, value in kubelet.command(job(file), 0)[1].items():
            monkeypatch.setenv(name, value)
    for index in (0, 1):
        verb, *words = said(file, index=index)
        assert verb == "launch"
        options, arguments = words[: words.index("--")], words[words.index("--") + 1 :]
        started = command(options, arguments)
        parsed = get_args_parser().parse_args(started[started.index("harness.launcher.agent") + 1 :])
        assert parsed.rdzv_backend == "c10d"
        assert not parsed.standalone
        assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "auto", 3)
        given = dict(pair.split("=") for pair in parsed.rdzv_conf.split(","))
        known = f"{c10d_rendezvous_backend.create_backend.__doc__} {dynamic_rendezvous.create_handler.__doc__}"
        assert all(f"| {key} " in known for key in given)
        assert given["is_host"] == ("1" if index == 0 else "0")
        assert arguments[0] == "train"
        cli.commands["train"].make_context("train", list(arguments[1:]))
        assert load_config(arguments[1], arguments[2:]).checkpoint.url == kubelet.URL


@pytest.mark.parametrize("file", kubelet.FILES)
def test_the_rendezvous_is_on_pod_0_and_all_agree_on_it(file):
    """Its number of pods is the Job's, and where attempts are numbered, each has an id of its own."""
    made = job(file)
    options = [dict(word.partition("=")[::2] for word in said(file, index=index)) for index in (0, 1)]
    assert options[0]["--rdzv-endpoint"] == options[1]["--rdzv-endpoint"]
    assert options[0]["--rdzv-endpoint"].partition(":")[0] == kubelet.host(made, 0)
    assert options[0]["--rdzv-id"] == options[1]["--rdzv-id"] != ""
    assert int(options[0].get("--nnodes", "0")) in (made["spec"]["completions"], 0)
    again = dict(word.partition("=")[::2] for word in said(file, attempt=1))
    assert (again["--rdzv-id"] == options[0]["--rdzv-id"]) == (file == "job.yaml")


def test_every_shell_in_a_launch_file_parses():
    scripts = [path.read_text() for path in LAUNCHERS if path.suffix != ".yaml"]
    task = yaml.safe_load(SKYPILOT.read_text())
    scripts += [task["setup"], task["run"], *(kubelet.command(job(file), 0)[0][2] for file in kubelet.FILES)]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, check=True, text=True)


# --- their command lines, run ----------------------------------------------------------------------------------------


def config(place: Path, steps: int = MOST_STEPS, **sections) -> dict:
    return {
        "task": TASK,
        "args": {"pause_seconds": 0.004},
        "train": {"steps": steps, "global_batch_size": 6},
        "checkpoint": {"url": str(place / "run"), "every_steps": 10, "keep_last": 2},
        "log": {"every_steps": 1, "jsonl": str(place / "log.jsonl")},
        **sections,
    }


needs_hosts = pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing() or "-")


@pytest.mark.torchrun
@needs_hosts
@pytest.mark.parametrize(
    "others", [("jobset.yaml",), pytest.param(("jobset.yaml", "trainjob.yaml"), marks=pytest.mark.soak)], ids=" ".join
)
def test_a_pod_is_evicted_and_the_run_goes_on(tmp_path, others):
    """All pods end with the code that is free; the next ones go on, those of the other files, too, and end with 0. None
    waits for one that was told to go, as torchrun's agents do for five minutes."""
    with pods("job.yaml", tmp_path, config(tmp_path)) as (first, second):
        first.wait_for("train", step=20)
        evict(second)
        assert [second.finish(), first.finish()] == [75, 75], first.output() + second.output()
        step = newest(tmp_path / "run")["step"]
        assert f"at step {step}, which is saved" in first.output()
    for attempt, file in enumerate(others, 1):
        with pods(file, tmp_path, config(tmp_path, step + 10), attempt=attempt) as runs:
            # A pod that asks for the rendezvous before it is there waits ever longer between its tries.
            assert [run.finish(180) for run in runs] == [0, 0], "\n".join(run.output() for run in runs)
            assert [found["step"] for found in runs[0].events("resume")] == [step], file
        step = newest(tmp_path / "run")["step"]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    trained = [record["step"] for record in records if record["event"] == "train"]
    assert trained == list(range(1, step + 1)), "each step was trained once"


METADATA_URL = "http://127.0.0.1:8123"
METADATA = """
import sys, time
from pathlib import Path
from tests.support.metadata_server import MetadataServer
with MetadataServer(8123) as server:
    while True:
        if Path(sys.argv[1]).exists():
            server.aws["spot/instance-action"] = '{"action": "terminate", "time": "2030-01-01T00:02:00Z"}'
        time.sleep(0.1)
"""


@contextlib.contextmanager
def skypilots(place: Path, settings: dict) -> Iterator[list[Run]]:
    """Runs SkyPilot's script on all its machines, each with a metadata service; a file there says that it will be taken."""
    task, path = yaml.safe_load(SKYPILOT.read_text()), place / "config.json"
    path.write_text(json.dumps({**settings, "preemption": {"base_url": METADATA_URL}}))
    env = {**task["envs"], "CONFIG": str(path), "URL": settings["checkpoint"]["url"], "PET_NPROC_PER_NODE": "1"}
    with hosts(["head", "worker"]) as machines:
        for name, machine in machines.items():
            service = [sys.executable, "-c", METADATA, str(place / f"{name}-is-taken")]
            machine.start(*service, env={})
        yield [
            kubelet.start(machine, place, ["bash", "-c", task["run"]], {**env, **skypilot_env(rank)})
            for rank, machine in enumerate(machines.values())
        ]


@pytest.mark.soak
@pytest.mark.torchrun
@needs_hosts
def test_skypilots_machines_are_taken_away_and_the_run_goes_on(tmp_path):
    """The cloud's notice stops all, with the code that SkyPilot is told to start again; the next start ends with 0."""
    again = yaml.safe_load(SKYPILOT.read_text())["resources"]["job_recovery"]["recover_on_exit_codes"]
    with skypilots(tmp_path, config(tmp_path)) as runs:
        runs[0].wait_for("train", step=20)
        (tmp_path / "worker-is-taken").touch()
        assert {run.finish() for run in runs} == set(again)
        step = newest(tmp_path / "run")["step"]
        assert f"at step {step}, which is saved" in runs[0].output()
    (tmp_path / "worker-is-taken").unlink()
    with skypilots(tmp_path, config(tmp_path, step + 10)) as runs:
        assert [run.finish() for run in runs] == [0, 0], "\n".join(run.output() for run in runs)
        assert [found["step"] for found in runs[0].events("resume")] == [step]


@pytest.mark.soak
@pytest.mark.torchrun
@pytest.mark.skipif(not TORCHX.exists(), reason="needs TorchX in build/torchx: see .ci/run")
def test_torchx_runs_the_line_of_the_page(tmp_path):
    """As it stands in docs/guides/launching.md, with another configuration."""
    (line,) = re.findall(r"^    torchx (.*)$", PAGE, re.MULTILINE)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(tmp_path, 20)))
    words = [str(path) if word == kubelet.CONFIG else word for word in shlex.split(line)]
    assert str(path) in words
    execute = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    env = {"PATH": path_with_harness(tmp_path)}
    with launch(tmp_path, None, command=("-c", execute, str(TORCHX), *words), env=env) as run:
        run.succeed()
    assert newest(tmp_path / "run")["step"] == 20


# --- what they say of themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_a_launch_file_says_what_arrives_and_how_the_run_comes_back(path):
    """At its top, with the time; and docs/guides/launching.md has a row for it."""
    lines = path.read_text().removeprefix("#!/usr/bin/env bash\n").splitlines()
    header = " ".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert re.search(r"[Ww]hat arrives", header)
    assert re.search(r"how (it|the run) comes back", header, re.IGNORECASE)
    assert re.search(r"\d\)? s\b|\(\d+\)|minutes", header)
    assert f"](../../{path.relative_to(REPOSITORY)})" in PAGE
