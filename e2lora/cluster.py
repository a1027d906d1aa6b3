"""What a Ray cluster holds, and what it must: checked before anything starts."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from e2lora.config import GroupSpec
from e2lora.fleet import Node, smallest

Answer = TypeVar("Answer")

HEAD = {"node:__internal_head__": 0.001}
"""Places what needs no CPU on the head node; it runs though groups hold every CPU."""
ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""At 0, what Ray does by itself on macOS: its node is 127.0.0.1. It has no other switch for that,
and takes the machine's own address for 127.0.0.1 where it is given as the node's."""


def connect() -> None:
    """To the cluster of RAY_ADDRESS, which a submitted job has; else a Ray of this process's own.

    Left to itself Ray would look for the last one that ran here, and wait for it if it was killed.
    One of our own listens on loopback only.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":  # heeded if it stands there when Ray is imported
        os.environ.setdefault(ON_LOOPBACK, "0")
    import ray

    if not ray.is_initialized():
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)


def is_of_the_cluster(error: Exception) -> bool:
    """Whether this is what Ray says of a cluster that broke."""
    from ray.exceptions import RayError

    return isinstance(error, RayError)


def nodes() -> list[Node]:
    """The machines that are there now."""
    import ray

    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [Node(have.get("CPU", 0), have.get("GPU", 0)) for have in alive]


def free_nodes() -> list[Node]:
    """What of each machine nobody holds now; a little old, perhaps."""
    from ray._private.state import available_resources_per_node  # of Ray's developers' interface

    free = available_resources_per_node().values()
    return [Node(have.get("CPU", 0), have.get("GPU", 0)) for have in free]


def slots(spec: GroupSpec) -> int:
    """How many groups of this kind, as small as they may be, the whole cluster holds at once."""
    workers = 0
    for node in nodes():
        fits = [node.cpus // spec.cpus_per_worker]
        if spec.gpus_per_worker:
            fits.append(node.gpus // spec.gpus_per_worker)
        workers += int(min(fits))
    return workers // smallest(spec)


class Wanted:
    """Groups that there is no room for yet, made known to an autoscaler.

    As placement groups that wait: those an autoscaler sees whoever started it, and they end with
    their driver. (Ray has one standing request per cluster beside them, which Ray Train's own
    coordinator writes anew all the time.) Without an autoscaler they wait for nothing.

    One that finds room is given back at once, and for a while nothing is wanted: either the group
    that it stands for can be started, or the room is for a group that is coming up and has not
    taken it yet, which this must not do over and over in its place.

    Args:
        quiet_seconds: that while.
    """

    def __init__(self, quiet_seconds: float = 30.0) -> None:
        self._waiting: list[tuple[GroupSpec, Any]] = []
        self._quiet_seconds, self._quiet_until = quiet_seconds, -math.inf

    def update(self, lacking: Mapping[GroupSpec, int]) -> None:
        """From now on these are wanted, so many groups of each kind."""
        from ray.util.placement_group import (
            placement_group,
            placement_group_table,
            remove_placement_group,
        )

        placed = [g for _, g in self._waiting if placement_group_table(g)["state"] == "CREATED"]
        if placed:
            self._quiet_until = time.monotonic() + self._quiet_seconds
        missing = Counter(lacking if time.monotonic() >= self._quiet_until else {})
        kept = []
        for spec, waiting in self._waiting:
            if missing[spec] > 0:
                missing[spec] -= 1
                kept.append((spec, waiting))
            else:
                remove_placement_group(waiting)
        for spec in missing.elements():
            kept.append((spec, placement_group([_resources(spec)] * smallest(spec))))
        self._waiting = kept


def _resources(spec: GroupSpec) -> dict[str, float]:
    """Of one worker."""
    gpus = {"GPU": spec.gpus_per_worker} if spec.gpus_per_worker else {}
    return {"CPU": spec.cpus_per_worker, **gpus}


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
            f"{smallest(spec)} worker(s) of {spec.cpus_per_worker:g} CPU and "
            f"{spec.gpus_per_worker:g} GPU each, and the cluster has {have.get('CPU', 0):g} CPU "
            f"and {have.get('GPU', 0):g} GPU on {len(ray.nodes())} node(s). Lower `num_workers`, "
            "`cpus_per_worker` or `gpus_per_worker`, add nodes, or give --may-grow where an "
            "autoscaler brings them."
        )


@dataclass(frozen=True)
class Heard(Generic[Answer]):
    """What one node answered, or why it didn't."""

    address: str
    is_head: bool
    cpus: float
    gpus: float
    answer: Answer | None
    error: str | None = None


def on_every_node(
    ask: Callable[..., Answer], *arguments: Any, seconds: float = 120.0
) -> list[Heard[Answer]]:
    """Call a function on every node at once, each time in a process that ends with it.

    On a cluster of one node it is called here.

    Args:
        seconds: after which a node counts as one that doesn't answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) == 1:
        return [_heard(alive[0], alive, ask(*arguments))]
    asked = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(ask)
    asking = []
    for node in alive:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asking.append(asked.options(scheduling_strategy=there).remote(*arguments))
    ready, _ = ray.wait(asking, num_returns=len(asking), timeout=seconds)
    heard = []
    for node, answer in zip(alive, asking, strict=True):
        if answer not in ready:
            ray.cancel(answer, force=True)
            heard.append(_heard(node, alive, None, f"no answer within {seconds:.0f} s"))
            continue
        try:
            heard.append(_heard(node, alive, ray.get(answer)))
        except ray.exceptions.RayError as error:
            heard.append(_heard(node, alive, None, str(error).strip().splitlines()[-1]))
    return heard


def _heard(
    node: Mapping[str, Any],
    all_nodes: Sequence[Mapping[str, Any]],
    answer: Any,
    error: str | None = None,
) -> Heard[Any]:
    address, have = node["NodeManagerAddress"], node["Resources"]
    if sum(other["NodeManagerAddress"] == address for other in all_nodes) > 1:
        address = f"{address}#{node['NodeID'][:6]}"
    is_head = "node:__internal_head__" in have
    return Heard(address, is_head, have.get("CPU", 0), have.get("GPU", 0), answer, error)
