"""Manifests for Kubernetes: an indexed Job with a headless Service, or a TrainJob of Kubeflow Trainer."""

import re
from typing import Any

from lockstep.errors import UserError
from lockstep.jobfile.job import Job

_LABEL = "app.kubernetes.io/instance"
_RUNTIME = "torch-distributed"
_TRAINJOB_WORDS = 128  # what the definition of a TrainJob allows in one list
_PLAIN = re.compile(r"[A-Za-z][\w./:-]*\w")
TRAINJOB_PORT = 29500  # set by Kubeflow Trainer

Manifest = dict[str, Any]


def indexed_job(job: Job, *, secret: str | None = None, volumes: dict[str, str] | None = None) -> str:
    """Return a headless Service and a Job of one pod a node as YAML.

    The pods meet at the first of them. ``secret`` holds the variables that are passed on, ``volumes`` maps persistent
    volume claims to the paths where the pods see them.
    """
    labels = {_LABEL: job.name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name, "labels": labels},
        "spec": {
            "clusterIP": "None",
            "selector": labels,
            # The first pod has to have its name before it is ready: the others wait for it to become ready.
            "publishNotReadyAddresses": True,
            "ports": [{"name": "rendezvous", "port": job.port}],
        },
    }
    deadline = {"activeDeadlineSeconds": job.time_s} if job.time_s else {}
    manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": 0,
            **deadline,
            "template": {"metadata": {"labels": labels}, "spec": _pod(job, secret, volumes or {})},
        },
    }
    return _as_yaml(service, manifest)


def train_job(job: Job, *, secret: str | None = None) -> str:
    """Return a TrainJob as YAML; Kubeflow Trainer itself tells torchrun how many nodes there are and where they meet.

    Raises:
        UserError: the training command has more words than a TrainJob can hold.
    """
    if len(job.command) > _TRAINJOB_WORDS:
        raise UserError(
            f"the training command has {len(job.command)} words, a TrainJob holds {_TRAINJOB_WORDS}; "
            "use --kubernetes job, or move overrides into the file of --config"
        )
    trainer: dict[str, Any] = {
        "image": job.image,
        "numNodes": job.nodes,
        "numProcPerNode": job.gpus_per_node,
        "resourcesPerNode": _resources(job),
        "command": job.launcher,
        "args": _literal(job.command),
    }
    environment = _environment(job, secret)
    if environment:
        trainer["env"] = environment
    deadline = {"activeDeadlineSeconds": job.time_s} if job.time_s else {}
    return _as_yaml(
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": job.name},
            "spec": {"runtimeRef": {"name": _RUNTIME}, **deadline, "trainer": trainer},
        }
    )


def _pod(job: Job, secret: str | None, claims: dict[str, str]) -> Manifest:
    meeting = [
        "--node_rank=$(JOB_COMPLETION_INDEX)",
        f"--master_addr={job.name}-0.{job.name}",
        f"--master_port={job.port}",
    ]
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    volumes: list[Manifest] = [memory]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]  # NCCL needs more than a container's 64 MiB
    for claim, path in claims.items():
        volumes.append({"name": claim, "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": claim, "mountPath": path})
    container = {
        "name": "trainer",
        "image": job.image,
        "command": [*job.launcher, *job.size, *meeting, *_literal(job.command)],
        "env": _environment(job, secret),
        "ports": [{"name": "rendezvous", "containerPort": job.port}],
        "resources": _resources(job),
        "volumeMounts": mounts,
    }
    return {"subdomain": job.name, "restartPolicy": "Never", "containers": [container], "volumes": volumes}


def _resources(job: Job) -> Manifest:
    resources: Manifest = {"limits": {"nvidia.com/gpu": job.gpus_per_node}}
    if job.cpus_per_node:
        resources["requests"] = {"cpu": job.cpus_per_node}
    return resources


def _environment(job: Job, secret: str | None) -> list[Manifest]:
    values = [
        {"name": name, "value": value}
        for name, value in zip(job.environment, _literal(tuple(job.environment.values())), strict=True)
    ]
    secrets = [{"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}} for name in job.passed_on]
    return [*values, *secrets]


def _literal(words: tuple[str, ...]) -> list[str]:
    """Spell words so that they arrive as they are: Kubernetes expands ``$(NAME)`` and reads ``$$`` as ``$``."""
    return [word.replace("$", "$$") for word in words]


def _as_yaml(*manifests: Manifest) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes every object out, as readers of manifests expect, and quotes what only some parsers read as text."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        # YAML has had several rules: 1e-3 is text to PyYAML and a number to Kubernetes, y may be a truth value.
        style = None if _PLAIN.fullmatch(value) else "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return str(yaml.dump_all(manifests, Dumper=Dumper, sort_keys=False, width=1_000_000, allow_unicode=True))
