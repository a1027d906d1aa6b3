"""What a user sees while a study runs: a line per ended trial, and a pulse with its ETA."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback

from e2lora.broker import Running
from e2lora.pool import Pool
from e2lora.preflight import Plans
from e2lora.records import StudyFolder, TrialFolder
from e2lora.tracking import Tracker

PULSE_SECONDS = 10.0


class Progress(Callback):
    """Mirrors trials to the tracker as Tune hears of them, and prints how the study goes."""

    def __init__(
        self,
        folder: StudyFolder,
        pool: Pool,
        plans: Plans,
        tracker: Tracker,
        num_trials: int,
        num_ended: Callable[[], int],
    ) -> None:
        self._folder, self._pool, self._plans, self._tracker = folder, pool, plans, tracker
        self._num_trials, self._num_ended = num_trials, num_ended
        self._began = time.monotonic()
        self._ended_before = num_ended()
        self._stop = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Progress:
        self._pulse.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._pulse.join()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing for the copy that Tune writes for its own restore."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._pool.require_healthy()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._tracker.mirror_trial(self._folder.trial(trial.config["trial"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder = self._folder.trial(trial.config["trial"])
        self._tracker.mirror_trial(folder)
        print(self._line(folder), flush=True)

    def _line(self, folder: TrialFolder) -> str:
        config, result = folder.config(), folder.result()
        head = f"trial {folder.number:>3}  {config.label:<18}"
        if result is None:
            return f"{head} left open"
        if result.state == "failed":
            return f"{head} FAILED: {(result.error or '').splitlines()[-1][:160]}"
        ended = "" if result.state == "complete" else "  stopped early"
        metrics = "  ".join(
            f"{objective.name} {result.value(objective.name):.6g}"
            for objective in self._folder.record().objectives
        )
        return f"{head} {metrics}  {result.seconds:.0f} s{ended}"

    def _beat(self) -> None:
        while not self._stop.wait(PULSE_SECONDS):
            print(self.pulse(self._pool.progress()), flush=True)

    def pulse(self, running: dict[str, Running]) -> str:
        """One line: ended of all, what runs and how far, minutes gone and to go."""
        ended = self._num_ended()
        parts, underway = [], 0.0
        for key, (step, attempt, measured, doing) in sorted(running.items()):
            if key.startswith("profile"):
                parts.append("measuring a gradient profile")
                continue
            number = int(key.rpartition("-")[2])
            num_steps = self._plans.num_steps(self._folder.trial(number).config())
            underway += step / num_steps
            again = f" (attempt {attempt})" if attempt > 1 else ""
            if measured:
                again += f" loss {measured['loss']:.3g}, {measured['tokens_per_second']:,.0f} tok/s"
            if doing:
                again += f" {doing}"
            parts.append(f"#{number} {step}/{num_steps}{again}")
        gone = time.monotonic() - self._began
        done_here = ended - self._ended_before + underway
        eta = "?"
        if done_here > 0.5:
            eta = _clock(gone / done_here * (self._num_trials - ended - underway))
        what = ", ".join(parts) or "worker groups are starting"
        return f"[{_clock(gone)}] {ended}/{self._num_trials} trials ended; {what}; ETA {eta}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
