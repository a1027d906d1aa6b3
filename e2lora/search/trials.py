"""The thin Tune trial: it hands a job to the pool's broker and passes on what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e2lora.broker import Job
from e2lora.config import GroupSpec
from e2lora.recording import record
from e2lora.records import TrialFolder


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
        record(folder, folder.number, update)
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
