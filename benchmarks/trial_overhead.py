"""What a trial costs beside its steps: on a resident group, and with a TorchTrainer of its own.

    python benchmarks/trial_overhead.py
    python benchmarks/trial_overhead.py --trials 20 --own 3 --model /models/smollm2-135m

Tiny trials, one after another, on one worker of a local Ray. *Overhead* is all from submitting a
trial until its result is there, less its training steps and its evaluation: what must be done
before the first step, and from the last step to the next trial. The other side does the same work
in the same loop, in a `TorchTrainer` per trial, as Ray's documentation shows it. A group's first
trial brings it up and loads the model: it is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
AIM_SECONDS, AIM_RATIO = 1.0, 20.0
LOG = "E2LORA_TIMES"  # the file that workers write what they measured to
PARTS = {
    "load": "model and data",
    "begin": "checks, adapter",
    "Engine": "DeepSpeed engine",
    "save_checkpoint": "checkpoint",
    "save_adapter": "adapter saved",
    "check": "base checked",
}


class Span(NamedTuple):
    """Of one call in a worker, by the clock that all processes of a machine share."""

    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Trial(NamedTuple):
    """One trial from outside, and what its worker measured inside."""

    submitted: float
    ended: float
    spans: list[Span]

    def seconds(self, name: str) -> float:
        """Of all calls of that name, or until the engine starts."""
        if name == "begin":
            (whole,) = (span for span in self.spans if span.name == "trial")
            (engine,) = (span for span in self.spans if span.name == "Engine")
            return engine.begin - whole.begin
        return sum(span.seconds for span in self.spans if span.name == name)

    @property
    def work(self) -> float:
        return self.seconds("step") + self.seconds("evaluate")

    @property
    def overhead(self) -> float:
        return self.ended - self.submitted - self.work

    @property
    def before(self) -> float:
        """From submitting to the first step."""
        return min(s.begin for s in self.spans if s.name == "step") - self.submitted

    @property
    def after(self) -> float:
        """From the last step to the result, without the evaluation."""
        return self.overhead - self.before


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:minilm-l6")
    parser.add_argument("--data", default="demo:vader")
    parser.add_argument("--targets", nargs="+", default=["query", "value"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--trials", type=int, default=10, help="on a resident group")
    parser.add_argument("--own", type=int, default=2, help="with a TorchTrainer of their own")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    path = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    import ray

    with tempfile.TemporaryDirectory() as folder:
        os.environ[LOG] = f"{folder}/times.jsonl"
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
        )
        bench = Bench(Path(folder), options.model, options.data, options.targets, options.steps)
        resident = bench.on_a_resident_group(options.trials + 1)
        own = [bench.by_a_trainer_of_its_own() for _ in range(options.own)]
        ray.shutdown()
    print(report(resident, own))
    return 0


def report(resident: Sequence[Trial], own: Sequence[Trial]) -> str:
    from e2lora.text_table import text_table

    first, *rest = resident
    sides = {
        "resident group, its first": [first],
        f"resident group, {len(rest)} more": rest,
        f"TorchTrainer each, {len(own)}": own,
    }
    head = [
        "seconds, medians",
        "overhead",
        "before step 1",
        "after the last",
        "steps",
        "evaluation",
    ]
    rows = [
        [name, *(f"{_median(trials, of):.2f}" for of in (_overhead, _before, _after, *_WORK))]
        for name, trials in sides.items()
    ]
    inside = [
        [
            label,
            *(f"{_median(trials, lambda t, n=n: t.seconds(n)):.3f}" for trials in sides.values()),
        ]
        for n, label in PARTS.items()
    ]
    other = [
        f"{_median(trials, lambda t: t.overhead - sum(map(t.seconds, PARTS))):.3f}"
        for trials in sides.values()
    ]
    ours, theirs = _median(rest, _overhead), _median(own, _overhead)
    return "\n".join(
        [
            text_table(head, rows, right=range(1, 6)),
            "",
            text_table(
                ["of it, seconds", *sides],
                [*inside, ["broker, Ray, processes", *other]],
                right=range(1, 4),
            ),
            "",
            f"overhead of a trial on a resident group: {ours:.2f} s (aim: at most {AIM_SECONDS:g})",
            f"TorchTrainer per trial: {theirs / ours:.1f} times as much (aim: {AIM_RATIO:g})",
        ]
    )


def _median(trials: Sequence[Trial], of: Callable[[Trial], float]) -> float:
    return statistics.median(map(of, trials))


def _overhead(trial: Trial) -> float:
    return trial.overhead


def _before(trial: Trial) -> float:
    return trial.before


def _after(trial: Trial) -> float:
    return trial.after


_WORK = (lambda t: t.seconds("step"), lambda t: t.seconds("evaluate"))


class Bench:
    """Makes trials, alike but for seed and rank, and times them from outside."""

    def __init__(self, folder: Path, model: str, data: str, targets: list[str], steps: int) -> None:
        self.folder, self.log, self.number = folder, Path(os.environ[LOG]), 0
        self.tree: dict[str, Any] = {
            "model": {"name": model},
            "task": {"kind": "text_classification", "data": data, "validation_size": 64},
            "adapter": {"target_modules": targets},
            "training": {"max_steps": steps, "learning_rate": 1e-3},
        }

    def job(self) -> Any:
        """The next trial's, its plan written where the group looks for it."""
        from e2lora.broker import Job
        from e2lora.config import GroupSpec, TrialConfig
        from e2lora.models import load_structure
        from e2lora.plan import build_plan
        from e2lora.records import TrialFolder, write_json
        from e2lora.targets import find_targets
        from e2lora.tasks import load_task

        r = (4, 8)[self.number % 2]
        plan = {"topology": "none", "r": r, "lora_alpha": 2 * r}
        tree = {**self.tree, "plan": plan, "seed": self.number}
        config = TrialConfig.model_validate_json(json.dumps(tree))
        task = load_task(config.task)
        structure = load_structure(config.model, task.auto_class, task.num_labels)
        targets = find_targets(structure, config.adapter.target_modules)
        place = TrialFolder(self.folder / f"{self.number:05d}")
        write_json(place.plan_file, build_plan(targets, config.plan, None))
        write_json(place.config_file, config)
        self.number += 1
        payload = {"config": config.model_dump_json(), "folder": str(place.path)}
        return Job(f"trial-{place.path.name}", "trial", GroupSpec.of(config.training), payload)

    def on_a_resident_group(self, num_trials: int) -> list[Trial]:
        from trial_overhead import measured_group_loop  # by its name in workers

        from e2lora import pool

        pool._group_loop = measured_group_loop
        trials: list[Trial] = []
        jobs = [self.job() for _ in range(num_trials)]  # so that one follows the other at once
        with pool.Pool("overhead", self.folder) as groups:
            for job in jobs:
                with self._timed(job, trials):
                    groups.run(job)
        return [
            trial._replace(spans=spans)
            for trial, spans in zip(trials, self._spans(num_trials), strict=True)
        ]

    def by_a_trainer_of_its_own(self) -> Trial:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from trial_overhead import train_alone  # by its name in workers, where spans are kept

        trials: list[Trial] = []
        with self._timed(self.job(), trials) as job:
            TorchTrainer(
                train_alone,
                train_loop_config=job.payload,
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(num_workers=1),
                run_config=RunConfig(name=job.key, storage_path=str(self.folder)),
            ).fit()
        return trials[0]._replace(spans=self._spans(1)[0])

    @contextmanager
    def _timed(self, job: Any, trials: list[Trial]) -> Iterator[Any]:
        submitted = time.time()
        yield job
        trials.append(Trial(submitted, time.time(), []))
        print(f"{job.key}: {trials[-1].ended - submitted:.2f} s", file=sys.stderr)

    def _spans(self, num_trials: int) -> list[list[Span]]:
        """What workers wrote of the last trials; that of the very last may be on its way."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            if len(lines) == self.number:
                return [[Span(*s) for s in json.loads(line)] for line in lines[-num_trials:]]
            time.sleep(0.1)
        raise RuntimeError(
            f"workers must tell of {self.number} trials; {self.log} has {len(lines)}"
        )


def train_alone(payload: dict[str, str]) -> None:
    """What a user would run in a TorchTrainer: load, train, save."""
    measure_worker()
    import torch

    from e2lora.config import GroupSpec, TrialConfig
    from e2lora.records import TrialFolder
    from e2lora.resident import Resident
    from e2lora.training import Reports, run_trial

    config = TrialConfig.model_validate_json(payload["config"])
    resident = Resident(GroupSpec.of(config.training), torch.device("cpu"))
    base, data = resident.load(config)
    place = TrialFolder(Path(payload["folder"]))
    run_trial(base, data, place.plan(), config, place, Reports())
    _write_spans()


# ---- in the workers ---------------------------------------------------------------------------

_spans: list[Span] = []


def measured_group_loop(config: dict[str, Any]) -> None:
    """In place of a resident group's training function."""
    from e2lora.pool import _group_loop

    measure_worker()
    _group_loop(config)


def measure_worker() -> None:
    """From now on the parts of trials are timed in this process."""
    from e2lora import resident, training, worker

    for owner, name, label in (
        (resident.Resident, "load", "load"),
        (worker, "run_trial", "trial"),
        (training, "run_trial", "trial"),
        (training._Run, "_train_step", "step"),
        (training, "Engine", "Engine"),
        (training, "score_rows", "evaluate"),
        (training, "save_checkpoint", "save_checkpoint"),
        (training, "save_adapter", "save_adapter"),
        (resident.Resident, "drop_changed_base", "check"),
    ):
        setattr(owner, name, _timed(getattr(owner, name), label))
    checked = resident.Resident.drop_changed_base

    @wraps(checked)
    def check_and_tell(self: Any) -> None:
        checked(self)
        _write_spans()

    resident.Resident.drop_changed_base = check_and_tell  # type: ignore[method-assign]


def _timed(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        begin = time.time()
        try:
            return function(*arguments, **options)
        finally:
            _spans.append(Span(label, begin, time.time()))

    return timed


def _write_spans() -> None:
    with open(os.environ[LOG], "a") as file:
        file.write(json.dumps(_spans) + "\n")
    _spans.clear()


if __name__ == "__main__":
    sys.exit(main())
