"""A pool whose groups compute a known function instead of training: all the rest is real.

Ray, Tune, the ledger, the broker and the thin trials are as in a study; what stands in a trial's
place is a thread that reports values of ``curve(config)`` at steps, and can be stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from e2lora.config import GroupSpec, Study, TrialConfig
from e2lora.pool import Pool
from e2lora.preflight import Plans
from e2lora.records import StudyFolder, TrialFolder, write_json
from e2lora.search.ledger import LedgerSearch
from e2lora.search.study import Options, Stage, record_of

Curve = Callable[[TrialConfig], Sequence[tuple[int, float]]]


class SyntheticPool(Pool):
    def __init__(self, storage: Path, curve: Curve, seconds_per_step: float = 0.0) -> None:
        super().__init__("synthetic", storage)
        self._curve, self._seconds = curve, seconds_per_step

    def _fit(self, name: str, spec: GroupSpec) -> None:
        import ray

        def ask(method: str, *arguments: Any) -> Any:
            return ray.get(getattr(self.broker, method).remote(*arguments))

        try:
            incarnation = ask("join", name)
            while (attempt := ask("next_attempt", name, incarnation, spec)) != "retire":
                if attempt is not None:
                    self._serve(attempt, ask)
        except ray.exceptions.RayActorError:
            return  # the pool has closed

    def _serve(self, attempt: Any, ask: Callable[..., Any]) -> None:
        folder = TrialFolder(Path(attempt.job.payload["folder"]))
        config = TrialConfig.model_validate_json(attempt.job.payload["config"])
        metrics: dict[str, float] = {}
        for step, value in self._curve(config):
            time.sleep(self._seconds)
            metrics = {"accuracy": value}
            told = {"step": step, "metrics": metrics}
            if not ask("report", attempt.token, told, {}, {}):
                return  # it is no longer wanted
        counts = {"adapter_parameters": folder.plan().parameters, "head_parameters": 0}
        ask("complete", attempt.token, {"metrics": metrics, "seconds": 0.1, **counts})


def run_synthetic(
    study: Study,
    folder: StudyFolder,
    curve: Curve,
    seconds_per_step: float = 0.0,
    tracker: Any = None,
) -> LedgerSearch:
    """Stage one of a study; Ray must be there.

    Args:
        tracker: None: nothing is mirrored.
    """
    write_json(folder.record_file, record_of(study, "synthetic", folder))
    plans = Plans(folder.profiles)
    plans.check = lambda config: None  # type: ignore[method-assign]
    nobody = SimpleNamespace(mirror_all=lambda: None, mirror_trial=lambda trial: None)
    with SyntheticPool(folder.path / "ray", curve, seconds_per_step) as pool:
        kinds = (GroupSpec.of(study.space(_First()).training),)
        stage = Stage(plans, pool, tracker or nobody, kinds, Options(), time.monotonic())
        return stage.run("trials", study, folder, study.num_trials)


class _First:
    """Takes the first of what is offered."""

    number = 0

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[0]

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        return low

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        return low
