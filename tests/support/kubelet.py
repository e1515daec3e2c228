"""What Kubernetes does with ``launch/kubernetes``, done on this machine, which has no cluster.

``job`` is the Job that a file comes to, with what JobSet and Kubeflow Trainer add to theirs. ``command`` is what runs in a
pod of it, after the kubelet's own substitutions; ``verdict`` what the Job makes of its exit code; ``pods`` runs all of them,
each on a host of its own under the name that the cluster would give it, as process 1.
"""

import contextlib
import json
import os
import re
import signal
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.cluster import CONTAINER, Run, path_with_harness
from tests.support.hosts import Host, hosts

DIRECTORY = Path(__file__).parents[2] / "launch" / "kubernetes"
FILES = ("job.yaml", "jobset.yaml", "trainjob.yaml")
CONFIG, URL = "configs/gpt.yaml", "s3://bucket/runs/gpt"  # what the files name, for their readers to replace

Document = dict[str, Any]


def documents(file: str) -> dict[str, Document]:
    """The resources in a file, by their kinds."""
    return {found["kind"]: found for found in yaml.safe_load_all((DIRECTORY / file).read_text())}


def job(file: str) -> Document:
    """The Job that a file comes to."""
    found = documents(file)
    if "Job" in found:
        return found["Job"]
    if "JobSet" in found:
        name, jobset = found["JobSet"]["metadata"]["name"], found["JobSet"]["spec"]
    else:
        name, jobset = found["TrainJob"]["metadata"]["name"], found["TrainingRuntime"]["spec"]["template"]["spec"]
    (replicated,) = jobset["replicatedJobs"]
    spec = replicated["template"]["spec"]
    spec["template"]["spec"]["subdomain"] = name
    made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": f"{name}-{replicated['name']}-0"}, "spec": spec}
    if "TrainJob" in found:
        _as_trainer_does(made, found["TrainJob"]["spec"]["trainer"])
    return made


def _as_trainer_does(made: Document, trainer: Document) -> None:
    """What Kubeflow Trainer's torch policy adds to a runtime's Job."""
    made["spec"] |= {"completions": trainer["numNodes"], "parallelism": trainer["numNodes"]}
    container = only_container(made)
    container |= {"image": trainer["image"], "args": trainer["args"], "resources": trainer["resourcesPerNode"]}
    variables = {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": "auto",
        "PET_MASTER_ADDR": host(made, 0),
        "PET_MASTER_PORT": "29500",
    }
    container["env"] = [*container["env"], *({"name": name, "value": value} for name, value in variables.items())]


def only_container(made: Document) -> Document:
    (container,) = made["spec"]["template"]["spec"]["containers"]
    return container


def host(made: Document, index: int) -> str:
    """The name by which the others know a pod of an Indexed Job."""
    return f"{made['metadata']['name']}-{index}.{made['spec']['template']['spec']['subdomain']}"


def command(made: Document, index: int, attempt: int = 0) -> tuple[list[str], dict[str, str]]:
    """The command line of a pod, as the kubelet hands it over, and its environment."""
    labels = {
        "batch.kubernetes.io/controller-uid": "1e2d",
        "jobset.sigs.k8s.io/jobset-uid": "5f0c",
        "jobset.sigs.k8s.io/restart-attempt": str(attempt),
    }
    container = only_container(made)
    env = {"JOB_COMPLETION_INDEX": str(index)}
    for variable in container["env"]:
        path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        label = re.fullmatch(r"metadata\.labels\['(.*)'\]", path)
        env[variable["name"]] = labels[label[1]] if label else variable["value"]

    def expand(text: str) -> str:
        """$(NAME) is the variable, where there is one; $$ is a dollar; all else stays."""
        return re.sub(r"\$(?:\$|\(([^)]*)\))", lambda found: env.get(found[1], found[0]) if found[1] else "$", text)

    return [expand(word) for word in [*container["command"], *container.get("args", [])]], env


def verdict(made: Document, exit_code: int, *, evicted: bool = False) -> tuple[str, str]:
    """What a Job does about a pod that has failed, and the message with which it fails if it does: the first rule counts."""
    name = only_container(made)["name"]
    for index, rule in enumerate(made["spec"]["podFailurePolicy"]["rules"]):
        match = f"matching {rule['action']} rule at index {index}"
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if codes and codes["operator"] == "In" and codes["containerName"] == name and exit_code in codes["values"]:
            return rule["action"], f"Container {name} for pod ns/x failed with exit code {exit_code} {match}"
        if evicted and {"type": "DisruptionTarget", "status": "True"} in conditions:
            return rule["action"], f"Pod ns/x has condition DisruptionTarget {match}"
    return "Count", ""


@contextlib.contextmanager
def pods(file: str, place: Path, config: Mapping[str, Any], *, attempt: int = 0) -> Iterator[list[Run]]:
    """Runs all pods of a file with another configuration, and one rank in each."""
    made = job(file)
    path = place / f"config-{Path(file).stem}.json"
    path.write_text(json.dumps(config))
    indices = range(made["spec"]["completions"])
    with hosts([host(made, index).partition(".")[0] for index in indices]) as machines:
        runs = []
        for index, machine in enumerate(machines.values()):
            _know_by(machines, host(made, index), index)
            words, env = command(made, index, attempt)
            words = [word.replace(CONFIG, str(path)).replace(URL, config["checkpoint"]["url"]) for word in words]
            runs.append(start(machine, place, [*CONTAINER, *words], {**env, "PET_NPROC_PER_NODE": "1"}))
        yield runs


def _know_by(machines: Mapping[str, Host], name: str, index: int) -> None:
    """Lets all hosts know one of them by a longer name, too, as a pod's own /etc/hosts and the cluster's DNS do."""
    table = next(iter(machines.values())).folder / "hosts"
    lines = table.read_text().splitlines()
    address, short = lines[index + 1].split()
    lines[index + 1] = f"{address} {name}.default.svc.cluster.local {short} {name}"
    table.write_text("\n".join(lines) + "\n")


def start(machine: Host, place: Path, words: list[str], env: Mapping[str, str]) -> Run:
    """Runs a command on a host, for which ``harness`` is the one of this interpreter."""
    token, log = uuid.uuid4().hex, place / "log.jsonl"
    process = machine.start(*words, env={**env, "PATH": path_with_harness(place / "bin"), "HARNESS_TEST_TOKEN": token})
    return Run(process, token, log, log.stat().st_size if log.exists() else 0, machine.output_path)


def evict(run: Run) -> None:
    """What the kubelet does to a pod that has to go: SIGTERM for its process 1."""
    (first,) = filter(_is_first, run.processes())
    os.kill(first, signal.SIGTERM)


def _is_first(pid: int) -> bool:
    numbers = re.search(r"^NSpid:(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return numbers is not None and numbers[1].split()[1:] == ["1"]
