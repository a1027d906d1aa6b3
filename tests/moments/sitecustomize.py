"""Found by every Python process whose PYTHONPATH has this folder: workers stop for a moment.

`$E2LORA_MOMENTS/wanted` names a moment in the life of a trial. The first worker that comes to it
writes its process number to `reached`, and waits there until `go` appears: so whoever kills
something knows what it hits. Nothing else of the project is changed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("E2LORA_MOMENTS")
LONGEST_WAIT = 60.0


def pass_through(moment: str) -> None:
    """Wait here if this is the moment that is wanted, and nobody came to it before."""
    folder = Path(FOLDER or "")
    try:
        if (folder / "wanted").read_text() != moment:
            return
        passing = folder / f"reached.{os.getpid()}"
        passing.write_text(str(os.getpid()))
        os.link(passing, folder / "reached")  # one only: it fails if it is there
    except OSError:
        return
    deadline = time.monotonic() + LONGEST_WAIT
    while not (folder / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def change_worker(worker: Any) -> None:
    """`e2lora.worker`: before a profile is measured, in a step, in an evaluation."""
    measure, reports_of = worker.measure_profile, worker.Link.reports

    def measure_profile(*arguments: Any, **options: Any) -> Any:
        pass_through("profiling")
        return measure(*arguments, **options)

    def reports(self: Any, token: str) -> Any:
        made = reports_of(self, token)

        def on_step(step: int, measured: dict[str, float]) -> bool:
            if step == 5:  # past the first checkpoint
                pass_through("step")
            return made.on_step(step, measured)

        def alive(doing: str | None = None, *arguments: Any) -> None:
            if doing and "scoring" in doing:
                pass_through("evaluation")
            made.alive(doing, *arguments)

        return worker.Reports(alive=alive, on_step=on_step, on_evaluation=made.on_evaluation)

    worker.measure_profile, worker.Link.reports = measure_profile, reports


def change_checkpoint(checkpoint: Any) -> None:
    """`e2lora.training.checkpoint`: between the tensors and what completes them."""
    write = checkpoint.write_json

    def write_json(file: Path, value: Any) -> None:
        pass_through("checkpoint")
        write(file, value)

    checkpoint.write_json = write_json


CHANGES = {"e2lora.worker": change_worker, "e2lora.training.checkpoint": change_checkpoint}


class Changing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads a module as it is, and then changes it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in CHANGES:
            return None
        sys.meta_path.remove(self)
        try:
            self.own = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        return importlib.util.spec_from_file_location(name, self.own.origin, loader=self)

    def create_module(self, spec: Any) -> Any:
        return None

    def exec_module(self, module: Any) -> None:
        self.own.loader.exec_module(module)
        CHANGES[module.__name__](module)


if FOLDER:
    sys.meta_path.insert(0, Changing())
