"""A study that is made up on disk, trial by trial, so that what a report must say is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from e2lora.adapters import count_adapter_parameters
from e2lora.config import (
    AdapterConfig,
    AnyTaskConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    TextClassificationConfig,
    TrainConfig,
    TrialConfig,
)
from e2lora.moments import GradientProfile, LayerGradient, Moments, Provenance, Target
from e2lora.plan import build_plan
from e2lora.records import (
    Failure,
    StudyFolder,
    StudyRecord,
    Suggestion,
    TrialFolder,
    TrialResult,
    write_json,
)

MODEL, TASK = ModelConfig(name="tiny-encoder"), TextClassificationConfig(data="reviews")
ACCURACY = Objective(name="accuracy", direction="maximize")
SIZE = Objective(name="adapter_parameters", direction="minimize")
TARGETS = tuple(
    Target(
        path=f"encoder.layer.{layer}.attention.self.{name}",
        module_type=f"encoder.layer.*.attention.self.{name}",
        layer=layer,
        in_features=384,
        out_features=384,
    )
    for layer in range(6)
    for name in ("query", "value")
)
SIGMAS = {"query": (1, 1.1, 2.4, 2.2, 5, 1.2), "value": (9, 8, 7.5, 3, 2.8, 2.5)}
LORA: dict[str, Any] = {"topology": "none"}
SHARED_A: dict[str, Any] = {"topology": "none", "a_scope": "type"}
ALL: dict[str, Any] = {"topology": "all"}
BLOCKS: dict[str, Any] = {"topology": "blocks", "block_size": 2}
RANDOM: dict[str, Any] = {"topology": "random", "partition_seed": 0}
MATCHED: dict[str, Any] = {"topology": "matched"}
E2: dict[str, Any] = {"topology": "e2"}
LSS: dict[str, Any] = {"topology": "e2", "allocation": "uniform"}
HRA: dict[str, Any] = {"topology": "none", "allocation": "entropy_power"}
KL: dict[str, Any] = {"topology": "e2", "similarity": "kl"}
FULL: dict[str, Any] = {"family": "full"}


def make_profile() -> GradientProfile:
    provenance = Provenance(
        model=MODEL.name,
        model_fingerprint="0" * 16,
        task=TASK.data,
        num_samples=256,
        num_supervised=256,
        seed=0,
        dtype="float32",
        mean_loss=0.7,
        method="blocks",
        num_workers=1,
        versions={},
    )
    layers = tuple(
        LayerGradient(
            target=target,
            moments=Moments(
                count=384 * 384,
                mean=0.0,
                std=SIGMAS[target.path.rpartition(".")[2]][target.layer] * 1e-4,
                mean_abs=1e-4,
            ),
        )
        for target in TARGETS
    )
    return GradientProfile(provenance=provenance, layers=layers)


class MadeUpStudy:
    """Writes a study's folder trial by trial."""

    def __init__(
        self,
        storage: Path,
        objectives: Sequence[Objective] = (ACCURACY, SIZE),
        quota: int = 0,
        budgets: tuple[int, ...] = (),
    ) -> None:
        self.folder = StudyFolder(storage, "made-up")
        self.profile = make_profile()
        self.num_trials, self.num_runs = 0, 0
        record = StudyRecord(
            name="made-up",
            space="quickstart",
            models=(MODEL,),
            tasks=(TASK,),
            objectives=tuple(objectives),
            budgets=budgets,
            seeds=(0,),
            quota=quota,
        )
        write_json(self.folder.record_file, record)
        write_json(self.folder.profiles / "profile.json", self.profile)

    def add(
        self,
        topology: dict[str, Any],
        r: int = 8,
        outcomes: Sequence[float] | None = None,
        budget: int | None = None,
        origin: Literal["quota", "point", "sampler"] | None = "quota",
        lr: float = 1e-3,
        model: ModelConfig = MODEL,
        task: AnyTaskConfig = TASK,
        params: dict[str, Any] | None = None,
        **ending: Any,
    ) -> int:
        """A trial with these outcomes; its accuracy is their mean unless ``metrics`` are given.

        Without an ``origin`` it is of a study from before suggestions were recorded.
        """
        number, self.num_trials = self.num_trials, self.num_trials + 1
        options = {k: v for k, v in topology.items() if k not in ("a_scope", "family")}
        family = topology.get("family", "lora")
        config = TrialConfig(
            model=model,
            task=task,
            adapter=AdapterConfig(
                family=family,
                target_modules=() if family == "full" else ("query", "value"),
                a_scope=topology.get("a_scope", "interval"),
            ),
            plan=PlanConfig(r=r, target_parameters=budget, **options),
            training=TrainConfig(max_steps=100, learning_rate=lr),
        )
        trial = self.folder.trial(number)
        if origin:
            write_json(trial.suggestion_file, Suggestion(origin=origin, params=params or {}))
        self._write(trial, config, outcomes, **ending)
        return number

    def add_run(
        self, chosen: int, seed: int, outcomes: Sequence[float] | None = None, **ending: Any
    ) -> int:
        """A trial's configuration at another seed; of random partitions another one."""
        number, self.num_runs = self.num_runs, self.num_runs + 1
        config = self.folder.trial(chosen).config().model_copy(update={"seed": seed})
        if config.plan.topology == "random":
            plan = config.plan.model_copy(update={"partition_seed": seed})
            config = config.model_copy(update={"plan": plan})
        trial = self.folder.seeds.trial(number)
        suggestion = Suggestion(origin="seeds", params={}, chosen=chosen)
        write_json(trial.suggestion_file, suggestion)
        self._write(trial, config, outcomes, **ending)
        return number

    def _write(
        self,
        trial: TrialFolder,
        config: TrialConfig,
        outcomes: Sequence[float] | None,
        outcome: str = "accuracy",
        metrics: dict[str, float] | None = None,
        test_metrics: dict[str, float] | None = None,
        test_outcomes: Sequence[float] | None = None,
        error: str | None = None,
        failure: Failure | None = None,
        state: Literal["complete", "stopped", "failed"] | None = None,
        ended: bool = True,
    ) -> None:
        write_json(trial.config_file, config)
        plan = build_plan(TARGETS, config.plan, self.profile)
        write_json(trial.plan_file, plan)
        if outcomes is not None:
            write_json(trial.outcomes_file, {outcome: [float(x) for x in outcomes]})
            metrics = metrics or {"accuracy": float(np.mean(outcomes))}
        if test_outcomes is not None:
            write_json(trial.test_outcomes_file, {outcome: [float(x) for x in test_outcomes]})
            test_metrics = test_metrics or {"accuracy": float(np.mean(test_outcomes))}
        result = TrialResult(
            number=trial.number,
            state=state or ("failed" if error or failure else "complete"),
            failure=failure,
            metrics=metrics or {},
            test_metrics=test_metrics or {},
            adapter_parameters=count_adapter_parameters(plan, config.adapter) or 22_713_216,
            head_parameters=770,
            seconds=80.0 + trial.number,
            attempts=1,
            error=error,
        )
        if ended:
            write_json(trial.result_file, result)


def right(n: int, of: int = 400) -> list[float]:
    """The first ``n`` items right, the others wrong."""
    return [1.0] * n + [0.0] * (of - n)


def line_with(text: str, *words: str) -> str:
    found = [line for line in text.splitlines() if all(word in line for word in words)]
    assert len(found) == 1, (words, text)
    return found[0]
