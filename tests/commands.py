"""The commands of ``jobs/`` as a user runs them: in processes and folders of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Command:
    """A script of ``jobs/``; what it prints stands in ``log.txt``."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        script: str = "train.py",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.storage, self.log = folder / "results", folder / "log.txt"
        own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "jobs" / script, *arguments],
                cwd=folder,
                env={**own, "PYTHONPATH": str(ROOT), **(environment or {"RAY_ADDRESS": "local"})},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text()

    def wait(self, timeout: float = 300) -> int:
        return self.process.wait(timeout)

    def wait_until(self, happened: Callable[[], Any], timeout: float = 200) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            assert self.process.poll() is None, f"it ended too early:\n{self.said()}"
            assert time.monotonic() < deadline, f"it took too long:\n{self.said()}"
            time.sleep(0.1)
