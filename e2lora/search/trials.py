"""The thin Tune trial: it hands a job to the pool's broker and passes on what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e2lora.broker import Job, affinity_of
from e2lora.config import GroupSpec, Pruner, TrialConfig
from e2lora.recording import record
from e2lora.records import TrialFolder
from e2lora.search.pruning import Curve, is_hopeless


def thin_trial(config: dict[str, Any]) -> None:
    """Watch over one trial; what it accepts is on disk before Tune hears of it.

    Of one that has ended, Tune is told what is on disk. A trial that fails is a result, not an
    exception: an exception here means that this watcher itself broke, and Tune then starts it
    again; it attaches to the job that goes on meanwhile.

    Args:
        config: ``folder`` of the trial, name of the ``broker``, its ``adapter_parameters`` and
            ``num_steps``, and where it may be stopped early the ``pruner`` and the ``metric`` that
            this looks at.
    """
    import ray
    from ray import tune

    def tell(evaluation: Mapping[str, Any], last: bool) -> None:
        result = folder.result() if last else None  # where the plan can't tell, its worker counted
        parameters = result.adapter_parameters if result else config["adapter_parameters"]
        told = {"step": evaluation["step"], "adapter_parameters": parameters}
        tune.report({**evaluation["metrics"], **told, "ended": last})

    folder = TrialFolder(Path(config["folder"]))
    if folder.result() is not None:
        evaluations = [evaluation.model_dump() for evaluation in folder.evaluations()]
        for evaluation in evaluations:
            tell(evaluation, last=evaluation is evaluations[-1])
        return
    broker = ray.get_actor(config["broker"])
    job = job_of(folder)
    ray.get(broker.submit.remote(job))
    seen, told = 0, 0
    while True:
        news = ray.get(broker.wait.remote(job.key, seen))
        if news is None:
            continue
        seen, update = news
        try:
            record(folder, folder.number, update, config["adapter_parameters"])
        except OSError as error:
            ray.get(broker.tell_trouble.remote(str(error)))  # the study ends, and goes on later
            raise
        for evaluation in update.evaluations[told:]:
            tell(evaluation, last=update.ended and evaluation is update.evaluations[-1])
        told = len(update.evaluations)
        if update.ended:
            return
        if config["pruner"] and told and _should_stop(folder, config):
            ray.get(broker.stop.remote(job.key))  # unless it has ended; the next news say which


def job_of(folder: TrialFolder) -> Job:
    """A trial as work for a group; runs over seeds are final, and score test rows where they are.

    Its key says of which stage it is: numbers begin anew in each.
    """
    trial = folder.config()
    is_final = folder.suggestion().origin == "seeds"
    study = folder.path.parents[2 if is_final else 1]
    payload = {
        "config": trial.model_dump_json(),
        "folder": str(folder.path),
        "weights": str(study / "weights"),
    }
    if is_final and trial.task.test_split:
        payload["test"] = "once, by the weights that are kept"
    return Job(
        key=f"{'seeds' if is_final else 'trial'}-{folder.number:05d}",
        kind="trial",
        spec=GroupSpec.of(trial.training),
        payload=payload,
        affinity=affinity_of(trial),
    )


def _should_stop(folder: TrialFolder, config: Mapping[str, Any]) -> bool:
    """What the study's pruner says of the trial's last evaluation beside all that were recorded."""
    metric, trial = config["metric"], folder.config()
    complete: list[Curve] = []
    others: list[Curve] = []
    for other in folder.siblings():
        if other.number != folder.number and _are_rivals(trial, other.config()):
            result = other.result()
            ended = result is not None and result.state == "complete"
            if curve := _curve(other, metric["name"]):
                (complete if ended else others).append(curve)
    curve = _curve(folder, metric["name"])
    if not curve or curve[-1][0] == config["num_steps"]:
        return False  # it ends by itself
    pruner = Pruner(**config["pruner"])
    return is_hopeless(curve, complete, others, pruner, metric["direction"])


def _are_rivals(one: TrialConfig, other: TrialConfig) -> bool:
    return (one.model, one.task) == (other.model, other.task)


def _curve(folder: TrialFolder, metric: str) -> Curve:
    return [(e.step, e.metrics[metric]) for e in folder.evaluations() if metric in e.metrics]
