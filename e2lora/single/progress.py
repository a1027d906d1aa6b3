"""What a user sees of a single run: a line now and then, one per evaluation, and a table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from e2lora.broker import Running
from e2lora.pool import Pool
from e2lora.records import Evaluation, TrialFolder
from e2lora.text_table import text_table
from e2lora.training.stopping import best_of, is_over

PULSE_SECONDS = 10.0
LOOK_SECONDS = 1.0  # so that an attempt is seen from its beginning


class Pulse:
    """Prints a line every ten seconds, inside of its context."""

    def __init__(self, pool: Pool, num_steps: int) -> None:
        self._pool, self._pace = pool, Pace(num_steps)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        told = time.monotonic()
        while not self._stop.wait(LOOK_SECONDS):
            line = self._pace.line(self._pool.progress())
            if time.monotonic() - told >= PULSE_SECONDS:
                told = time.monotonic()
                print(line, flush=True)


class Pace:
    """How far a run is, and when it will have ended.

    Args:
        clock: seconds that only rise.
    """

    def __init__(self, num_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_steps, self._clock = num_steps, clock
        self._began = clock()
        self._seen: tuple[int, int, float] | None = None  # attempt, its first step seen, when

    def line(self, running: Mapping[str, Running]) -> str:
        """Minutes gone, step of all steps, what the last step showed, minutes to go."""
        gone = f"[{_clock(self._clock() - self._began)}]"
        for key, now in running.items():
            if key.startswith("profile"):
                return f"{gone} measuring the gradient profile"
            shown = _shown(now.measured) if now.step else []  # else of the attempt before
            parts = [f"step {now.step}/{self._num_steps}", *shown]
            if now.attempt > 1:
                parts.append(f"attempt {now.attempt}")
            parts += [now.doing] if now.doing else []
            return f"{gone} {'  '.join(parts)}  ETA {self._eta(now)}"
        return f"{gone} the worker group is starting"

    def _eta(self, now: Running) -> str:
        """By the steps of this attempt alone, from the first one that is seen: before it come
        start-up and the leap to a checkpoint.
        """
        moment = self._clock()
        if self._seen is None or self._seen[0] != now.attempt or self._seen[1] == 0:
            self._seen = (now.attempt, now.step, moment)
        _, first, since = self._seen
        if now.step == first:
            return "?"
        return _clock((moment - since) / (now.step - first) * (self._num_steps - now.step))


def _shown(measured: Mapping[str, float]) -> list[str]:
    forms = {"loss": "loss {:.4g}", "tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.0%}"}
    return [form.format(measured[name]) for name, form in forms.items() if name in measured]


def evaluation_line(evaluation: Evaluation) -> str:
    metrics = "  ".join(f"{name} {value:.5g}" for name, value in evaluation.metrics.items())
    return f"evaluation after {evaluation.step} steps: {metrics}"


def summary(folder: TrialFolder) -> str:
    """A run that has ended: its metrics, size and pace, and where everything is."""
    result, evaluations = folder.result(), folder.evaluations()
    assert result is not None
    rows = []
    for name, value in result.metrics.items():
        first, last = (evaluations[place].metrics.get(name, value) for place in (0, -1))
        rows.append([name, f"{first:.5g}", f"{last:.5g}", f"{value:.5g}"])
    first_step, last_step = (evaluations[place].step for place in (0, -1))
    header = ["metric", f"step {first_step}", f"step {last_step}", "kept"]
    if result.test_metrics:
        header.append("test")
        for row in rows:
            row.append(
                f"{result.test_metrics[row[0]]:.5g}" if row[0] in result.test_metrics else ""
            )
    facts = [
        ["adapter parameters", f"{result.adapter_parameters:,}"],
        ["head parameters", f"{result.head_parameters:,}"],
        ["seconds", f"{result.seconds:.1f}"],
        ["attempts", f"{result.attempts}"],
    ]
    if rate := tokens_per_second(folder.steps()):
        facts.append(["tokens/s", f"{rate:,.0f}"])
    training = folder.config().training
    if training.gradient_accumulation_steps == "auto":
        facts.append(["microbatches", f"{result.gradient_accumulation_steps} per step and worker"])
    if stopping := training.early_stopping:
        best = best_of(evaluations, stopping)
        told = f"{stopping.metric} was best after {best.step} steps, whose weights are kept"
        over = f"; ended after {last_step}" if is_over(evaluations, stopping) else ""
        facts.append(["early stopping", told + over])
    facts += [["folder", str(folder.path)], ["adapter", str(folder.adapter)]]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {value}" for name, value in facts]
    return "\n".join([text_table(header, rows, right=range(1, len(header))), "", *lines])


def tokens_per_second(steps: Mapping[str, Sequence[float]]) -> float | None:
    """Of all steps together; None where it wasn't measured.

    >>> tokens_per_second({"tokens_per_second": [100.0, 400.0], "seconds": [1.0, 1.0]})
    250.0
    """
    rates, seconds = steps.get("tokens_per_second"), steps.get("seconds")
    if not rates or not seconds:
        return None
    pairs = list(zip(rates, seconds, strict=True))
    return sum(rate * taken for rate, taken in pairs) / sum(seconds)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
