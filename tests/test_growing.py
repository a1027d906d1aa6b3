"""A pool on a cluster whose nodes come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from e2lora.pool import Pool
from tests.test_pool import require_all_free, trial_job

pytestmark = pytest.mark.long


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Of one node with one CPU."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def wait_until(true: Callable[[], Any], timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_groups_come_with_nodes_go_with_them_and_are_all_free_in_the_end(
    cluster: Cluster, tmp_path: Path
) -> None:
    endless = {"max_steps": 10**6, "schedule": "constant", "eval_every": 10**5}
    jobs = [trial_job(tmp_path, i, **endless) for i in range(3)]
    kind = jobs[0].spec
    with Pool("growing", tmp_path / "ray", lease_seconds=20) as pool, ThreadPoolExecutor(3) as open:
        results = [open.submit(pool.run, job) for job in jobs]
        wait_until(lambda: len(pool.progress()) == 1)
        assert pool.open_slots([kind]) == 1
        waiting = [group["state"] for group in ray.util.placement_group_table().values()]
        assert waiting.count("PENDING") == 2, "an autoscaler sees what else there is work for"

        node = cluster.add_node(num_cpus=2)
        wait_until(lambda: len(pool.progress()) == 3)
        assert pool.open_slots([kind]) == 3

        cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: ray.get(pool.broker.demand.remote())[0] == {kind: 2})
        assert len(pool.progress()) == 1
        for job in jobs:
            assert ray.get(pool.broker.stop.remote(job.key))
        assert [result.result(60) for result in results] == [{}] * 3
    assert pool.error is None
    require_all_free(1, timeout=60)
