import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from lockstep.errors import UserError
from lockstep.jobfile.job import Job
from lockstep.jobfile.kubernetes import indexed_job, train_job
from tests.jobfile.test_slurm import AWKWARD

JOB = Job(
    name="big-run",
    command=("-m", "lockstep.cli", "train", "--recipe", "r", "optimizer.lr=1e-3"),
    nodes=3,
    gpus_per_node=8,
    python="python",
    port=29511,
    image="registry/team/image:1",
)
# What one of the YAML rules in use reads as something else than text.
AMBIGUOUS = (
    "1e-3",
    "1",
    "0o14",
    "0x1f",
    "y",
    "no",
    "on",
    "null",
    "~",
    "true",
    ".inf",
    "1:30",
    "2026-01-01",
    "- a",
    "a: b",
)


def expanded(word: str, known: dict[str, str]) -> str:
    """Return what Kubernetes makes of a word of a command: $$ is $, $(NAME) the value of a known variable."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else known.get(m[1], m[0]), word)


def manifests(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


def test_an_indexed_job_and_its_service_fit_each_other() -> None:
    service, job = manifests(indexed_job(replace(JOB, time_s=3600, cpus_per_node=32)))
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert pod["subdomain"] == service["metadata"]["name"] == "big-run"
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    assert (job["spec"]["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert job["spec"]["activeDeadlineSeconds"] == 3600
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}, "requests": {"cpu": 32}}
    assert container["ports"][0]["containerPort"] == service["spec"]["ports"][0]["port"] == 29511
    assert [expanded(word, {"JOB_COMPLETION_INDEX": "2"}) for word in container["command"]] == [
        *"python -m torch.distributed.run --nnodes=3 --nproc_per_node=8 --node_rank=2".split(),
        *"--master_addr=big-run-0.big-run --master_port=29511".split(),
        *JOB.command,
    ]


def test_volumes_are_mounted_beside_shared_memory() -> None:
    _, job = manifests(indexed_job(JOB, volumes={"data-claim": "/data"}))
    pod = job["spec"]["template"]["spec"]
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory"}
    assert pod["volumes"][1]["persistentVolumeClaim"] == {"claimName": "data-claim"}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/dev/shm": "shared-memory", "/data": "data-claim"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts.values())


def test_a_train_job_leaves_the_meeting_to_kubeflow() -> None:
    (job,) = manifests(train_job(replace(JOB, time_s=60)))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert job["spec"]["activeDeadlineSeconds"] == 60
    assert job["spec"]["trainer"] == {
        "image": "registry/team/image:1",
        "numNodes": 3,
        "numProcPerNode": 8,
        "resourcesPerNode": {"limits": {"nvidia.com/gpu": 8}},
        "command": ["python", "-m", "torch.distributed.run"],
        "args": list(JOB.command),
    }
    with pytest.raises(UserError, match="has 129 words, a TrainJob holds 128; use --kubernetes job"):
        train_job(replace(JOB, command=("x",) * 129))


def test_every_word_and_variable_arrives_as_it_was_given() -> None:
    values = {f"V{number}": value for number, value in enumerate((*AWKWARD, *AMBIGUOUS, "$$(A)"))}
    job = replace(JOB, command=(*AWKWARD, *AMBIGUOUS, "$(JOB_COMPLETION_INDEX)", "$$"), environment=values)
    container = manifests(indexed_job(job))[1]["spec"]["template"]["spec"]["containers"][0]
    trainer = manifests(train_job(job))[0]["spec"]["trainer"]
    known = {"JOB_COMPLETION_INDEX": "0", "A": "wrong"}
    for words in (container["command"][-len(job.command) :], trainer["args"]):
        assert tuple(expanded(word, known) for word in words) == job.command
    for environment in (container["env"], trainer["env"]):
        assert {entry["name"]: expanded(entry["value"], known) for entry in environment} == values


def test_words_that_another_yaml_rule_reads_as_numbers_are_quoted() -> None:
    for text in (indexed_job(replace(JOB, command=AMBIGUOUS)), train_job(replace(JOB, command=AMBIGUOUS))):
        for word in AMBIGUOUS:
            assert f"- '{word}'\n" in text


def test_passed_on_variables_come_from_the_secret() -> None:
    text = train_job(replace(JOB, passed_on=("TOKEN",)), secret="team-keys")
    reference = {"secretKeyRef": {"name": "team-keys", "key": "TOKEN"}}
    assert manifests(text)[0]["spec"]["trainer"]["env"] == [{"name": "TOKEN", "valueFrom": reference}]
