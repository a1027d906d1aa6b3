"""The thin Tune trial: it hands a job to the pool's broker and passes on what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e2lora.broker import Job, Update
from e2lora.config import GroupSpec
from e2lora.records import Evaluation, TrialFolder, TrialResult, write_json, write_text


def thin_trial(config: dict[str, Any]) -> None:
    """Watch over one trial; what it accepts is on disk before Tune hears of it.

    A trial that fails is a result, not an exception: an exception here means that this watcher
    itself broke, and Tune then starts it again; it attaches to the job that goes on meanwhile.
    """
    import ray
    from ray import tune

    folder = TrialFolder(Path(config["folder"]))
    broker = ray.get_actor(config["broker"])
    trial = folder.config()
    payload = {"config": trial.model_dump_json(), "folder": str(folder.path)}
    job = Job(f"trial-{folder.number:05d}", "trial", GroupSpec.of(trial.training), payload)
    ray.get(broker.submit.remote(job))
    seen, told = 0, 0
    while True:
        news = ray.get(broker.wait.remote(job.key, seen))
        if news is None:
            continue
        seen, update = news
        record(folder, update)
        for evaluation in update.evaluations[told:]:
            last = update.ended and evaluation is update.evaluations[-1]
            tune.report(
                {
                    **evaluation["metrics"],
                    "step": evaluation["step"],
                    "adapter_parameters": config["adapter_parameters"],
                    "ended": last,
                }
            )
        told = len(update.evaluations)
        if update.ended:
            return


def record(folder: TrialFolder, update: Update) -> None:
    """Bring a trial's folder up to what the broker accepted; ``result.json`` comes last."""
    evaluations = [Evaluation(**evaluation) for evaluation in update.evaluations]
    if evaluations:
        lines = [evaluation.model_dump_json() + "\n" for evaluation in evaluations]
        write_text(folder.metrics_file, "".join(lines))
        write_json(folder.outcomes_file, update.outcomes)
    if update.ended:
        result = update.result or {}
        write_json(folder.losses_file, result.get("losses", []))
        write_json(
            folder.result_file,
            TrialResult(
                number=folder.number,
                state="complete" if update.result else "failed",
                metrics=result.get("metrics", {}),
                adapter_parameters=result.get("adapter_parameters", 0),
                head_parameters=result.get("head_parameters", 0),
                seconds=result.get("seconds", 0.0),
                attempts=update.attempts,
                error=update.error,
            ),
        )
