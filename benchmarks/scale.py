"""What a trial costs the driver, Optuna and MLflow as a study grows to thousands of them.

    python benchmarks/scale.py                      # 2,000 trials, six minutes on two cores
    python benchmarks/scale.py --trials 400 --sampler tpe --picture curves.png

Search, ledger, Ray Tune, broker, records, MLflow and report are the real ones; in place of training
stands a known function. The first trials take as long as the processes of the thin trials need to
start; afterwards Tune uses these again. A window is so many trials that ended one after another: a
cost that doesn't grow with the study is the same in all of them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS_TO_START = 4.0
"""Of a thin trial's process, generously."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sampler", default="random", help="random has no cost of its own")
    parser.add_argument("--at-once", type=int, default=8, help="trials; each has its thin one")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a trial takes")
    parser.add_argument("--picture", type=Path, help="PNG file of the curves")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from e2lora.command import QUIET

    os.environ.update(QUIET)
    import ray

    ray.init("local", num_cpus=options.at_once, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        windows = grow(Path(folder), options)
        reports = report_seconds(Path(folder), options.trials)
    ray.shutdown()
    print(table(windows, reports))
    if options.picture:
        draw(options.picture, windows)
    return 0


class Clock:
    """Seconds in calls, by what they are for."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str, what: str) -> None:
        call = getattr(owner, method)

        @wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.spent[what] += time.perf_counter() - began

        setattr(owner, method, timed)


def grow(folder: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Run the study; what each window cost per trial, in milliseconds, and the driver's memory."""
    import optuna
    import psutil

    from e2lora.records import StudyFolder
    from e2lora.search.ledger import LedgerSearch
    from e2lora.search.progress import Progress
    from e2lora.search.study import record_of
    from e2lora.tracking import Tracker
    from tests.synthetic import run_synthetic

    study, place = stub_study(options.trials, options.sampler), StudyFolder(folder, "scale")
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", place, record_of(study, "scale", place))
    clock, process = Clock(), psutil.Process()
    clock.watch(optuna.Study, "ask", "Optuna")
    clock.watch(optuna.Study, "tell", "Optuna")
    clock.watch(LedgerSearch, "suggest", "suggest")
    clock.watch(LedgerSearch, "on_trial_complete", "complete")
    clock.watch(tracker, "mirror_trial", "MLflow")
    clock.watch(Progress, "pulse", "pulse")
    windows: list[dict[str, float]] = []
    size, ended, began = options.trials // options.windows, 0, time.perf_counter()
    tell = Progress.on_trial_complete

    def on_trial_complete(self: Any, *arguments: Any, **named: Any) -> None:
        nonlocal ended, began
        tell(self, *arguments, **named)
        ended += 1
        if ended % size == 0:
            now = time.perf_counter()
            window = {what: 1000 * seconds / size for what, seconds in clock.spent.items()}
            window |= {"wall": 1000 * (now - began) / size, "ended": ended}
            window["MiB"] = process.memory_info().rss / 2**20
            windows.append(window)
            told = ", ".join(f"{what} {value:.1f}" for what, value in window.items())
            print(f"window {len(windows)}, ms per trial: {told}", file=sys.stderr, flush=True)
            clock.spent.clear()
            began = now

    Progress.on_trial_complete = on_trial_complete  # type: ignore[method-assign]
    ready_at = time.monotonic() + SECONDS_TO_START * options.at_once

    def takes_time(config: Any) -> Sequence[tuple[int, float]]:
        time.sleep(max(options.seconds, ready_at - time.monotonic()))
        return known_function(config)

    run_synthetic(study, place, takes_time, tracker=tracker)
    return windows


def known_function(config: Any) -> Sequence[tuple[int, float]]:
    """Best at a learning rate of 1e-3, better with more rank: one evaluation."""
    off = math.log10(config.training.learning_rate) + 3
    return [(1, 0.9 - 0.1 * off**2 - 0.2 / config.plan.r)]


def stub_study(num_trials: int, sampler: str) -> Any:
    from e2lora.config import (
        AdapterConfig,
        ModelConfig,
        Objective,
        PlanConfig,
        Study,
        TextClassificationConfig,
        TrainConfig,
        TrialConfig,
    )

    model = ModelConfig(name="demo:minilm-l6")
    task = TextClassificationConfig(data="demo:vader")

    def space(trial: Any) -> Any:
        return TrialConfig(
            model=model,
            task=task,
            adapter=AdapterConfig(target_modules=("query", "value")),
            plan=PlanConfig(topology="none", r=trial.suggest_int("r", 1, 16)),
            training=TrainConfig(
                max_steps=1,
                learning_rate=trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True),
            ),
        )

    return Study(
        space=space,
        models=(model,),
        tasks=(task,),
        objectives=(
            Objective(name="accuracy", direction="maximize"),
            Objective(name="adapter_parameters", direction="minimize"),
        ),
        num_trials=num_trials,
        sampler=sampler,
    )


def report_seconds(folder: Path, num_trials: int) -> list[tuple[int, float]]:
    """Of a report on a quarter, a half, and all of the trials."""
    import shutil

    from e2lora.records import StudyFolder
    from e2lora.report import render_report

    whole, measured = StudyFolder(folder, "scale"), []
    for count in (num_trials // 4, num_trials // 2, num_trials):
        part = StudyFolder(folder, f"scale-{count}")
        part.trials.mkdir(parents=True)
        shutil.copy(whole.record_file, part.record_file)
        for trial in whole.trial_folders()[:count]:
            (part.trials / trial.path.name).symlink_to(trial.path)
        began = time.perf_counter()
        render_report(part, count)
        measured.append((count, time.perf_counter() - began))
    return measured


def table(windows: Sequence[dict[str, float]], reports: Sequence[tuple[int, float]]) -> str:
    """Per trial of each window in ms, and how the last compares with the first."""
    from e2lora.text_table import text_table

    columns = ("wall", "suggest", "complete", "Optuna", "MLflow", "pulse")
    rows = [
        [f"{window['ended']:,.0f}", *(f"{window.get(c, 0):.1f}" for c in columns)]
        for window in windows
    ]
    for row, window in zip(rows, windows, strict=True):
        row.append(f"{window['MiB']:,.0f}")

    def growth(column: str) -> str:  # the first window starts the groups and fills caches
        return f"{windows[-1].get(column, 0) / max(windows[1].get(column, 0), 1e-9):.2f}"

    rows.append(["last / second", *map(growth, (*columns, "MiB"))])
    header = ["trials", *columns, "driver, MiB"]
    told = text_table(header, rows, right=range(len(header)))
    seconds = ", ".join(f"{count:,} trials {value:.1f} s" for count, value in reports)
    return f"ms per trial (suggest and complete hold Optuna's)\n{told}\nreport: {seconds}"


def draw(file: Path, windows: Sequence[dict[str, float]]) -> None:
    """What a trial costs, and the driver's memory, against the number of trials."""
    from e2lora.figures import COLOURS, make_panels, save_figure

    figure, (cost, memory) = make_panels(2, 5.2, 3.2)
    ended = [window["ended"] for window in windows]
    parts = {"suggest": "suggestion", "MLflow": "MLflow", "Optuna": "Optuna", "complete": "result"}
    for (part, name), colour in zip(parts.items(), COLOURS, strict=False):
        cost.plot(ended, [window[part] for window in windows], "o-", color=colour, label=name)
    cost.set_ylabel("ms per trial")
    cost.legend(frameon=False)
    memory.plot(ended, [window["MiB"] for window in windows], "o-", color=COLOURS[0])
    memory.set_ylabel("memory of the driver, MiB")
    for axes in (cost, memory):
        axes.set_xlabel("trials of the study")
        axes.set_ylim(bottom=0)
    save_figure(figure, file)


if __name__ == "__main__":
    sys.exit(main())
