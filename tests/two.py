"""Two workers of one trial: ``python -m tests.two FOLDER RANK MODULE`` is one of them.

It calls ``train_shared(folder, group, 2)`` of a test's module, which says what there is to compare.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def in_two(module: str, folder: Path) -> list[Any]:
    """What each worker returned."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two", str(folder), str(rank), module],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=300)
        assert worker.returncode == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _worker() -> None:
    import torch
    import torch.distributed as dist

    folder, rank, module = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    told = importlib.import_module(module).train_shared(folder, group, 2)
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.barrier(group)
    dist.destroy_process_group()


if __name__ == "__main__":
    _worker()
