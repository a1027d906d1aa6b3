"""What a Ray cluster holds, and what it must: checked before anything starts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from e2lora.config import GroupSpec

HEAD = {"node:__internal_head__": 0.001}
"""Places what needs no CPU on the head node; it runs though groups hold every CPU."""


def connect() -> None:
    """To the cluster of RAY_ADDRESS, which a submitted job has; else a Ray of this process's own.

    Left to itself Ray would look for the last one that ran here, and wait for it if it was killed.
    """
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)


def is_of_the_cluster(error: Exception) -> bool:
    """Whether this is what Ray says of a cluster that broke."""
    from ray.exceptions import RayError

    return isinstance(error, RayError)


def slots(spec: GroupSpec) -> int:
    """How many groups of this kind, as small as they may be, the whole cluster holds at once."""
    import ray

    workers = 0
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"]
            fits = [have.get("CPU", 0) // spec.cpus_per_worker]
            if spec.gpus_per_worker:
                fits.append(have.get("GPU", 0) // spec.gpus_per_worker)
            workers += int(min(fits))
    return workers // (spec.min_workers or spec.num_workers)


def require_fits(spec: GroupSpec) -> None:
    """Refuse a kind of group of which not even one fits the cluster.

    Raises:
        ValueError: with what is asked for and what there is.
    """
    import ray

    if slots(spec) == 0:
        have = ray.cluster_resources()
        raise ValueError(
            "a trial's workers must all fit the cluster at once; it asks for "
            f"{spec.min_workers or spec.num_workers} worker(s) of {spec.cpus_per_worker:g} CPU and "
            f"{spec.gpus_per_worker:g} GPU each, and the cluster has {have.get('CPU', 0):g} CPU "
            f"and {have.get('GPU', 0):g} GPU on {len(ray.nodes())} node(s). Lower `num_workers`, "
            "`cpus_per_worker` or `gpus_per_worker`, or add nodes."
        )


def require_shared_storage(path: Path) -> None:
    """With several nodes, what one writes the others must see.

    Raises:
        ValueError: naming the nodes that don't.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    path.mkdir(parents=True, exist_ok=True)
    token = path / f".shared-{os.getpid()}"
    token.touch()

    @ray.remote(num_cpus=0)
    def sees(file: str) -> bool:
        return os.path.exists(file)

    try:
        seen = ray.get(
            [
                sees.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ).remote(str(token))
                for node in nodes
            ],
            timeout=60,
        )
    finally:
        token.unlink()
    blind = [node["NodeManagerAddress"] for node, ok in zip(nodes, seen, strict=True) if not ok]
    if blind:
        raise ValueError(
            f"on several nodes, all must share the storage path; {path} isn't seen from "
            f"{', '.join(blind)}. Give --storage a folder on a shared file system (NFS, EFS, …)."
        )
