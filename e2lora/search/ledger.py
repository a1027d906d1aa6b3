"""The study's Optuna storage is its only ledger: this searcher keeps Tune in step with it.

A trial is asked for, written to its folder (trial.json, plan.json), run, and told from its
result.json. Whatever is killed in between, the ledger and the folders say where to go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from e2lora.config import Study, in_one_paragraph
from e2lora.pool import JobFailed, Pool
from e2lora.preflight import Plans, differences, with_absolute_paths
from e2lora.records import StudyFolder, TrialResult, write_json
from e2lora.search.plans import configuration_of, require_possible_in

MODES = {"maximize": "max", "minimize": "min"}


class ChangedSpace(RuntimeError):
    """The space of a resumed study isn't the one that its trials came from."""


class LedgerSearch(OptunaSearch):
    """OptunaSearch over spaces that return a :class:`TrialConfig`, on durable storage.

    Unfinished trials of an earlier run come first, under their own numbers; then the study's
    points; then the sampler's, until ``num_trials`` exist.
    """

    def __init__(
        self, study: Study, folder: StudyFolder, plans: Plans, pool: Pool, num_trials: int
    ) -> None:
        self._study, self._folder, self._plans, self._pool = study, folder, plans, pool
        self.num_trials = num_trials
        folder.path.mkdir(parents=True, exist_ok=True)
        super().__init__(
            space=self._configure,
            metric=[objective.name for objective in study.objectives],
            mode=[MODES[objective.direction] for objective in study.objectives],
            study_name=folder.name,
            storage=_storage(folder),
        )
        ledger: Any = self._ot_study
        self._ledger: optuna.Study = ledger
        existing = self._trials()
        started = sum(trial.state != TrialState.WAITING for trial in existing)
        # seeded by how far the study is, so that a resumed sampler doesn't repeat itself
        self._ledger.sampler = optuna.samplers.TPESampler(seed=study.seeds[0] + started)
        for point in study.points:
            self._ledger.enqueue_trial(dict(point), skip_if_exists=True)
        self._unfinished = self._settle(existing)

    @property
    def num_suggestions(self) -> int:
        """How many trials are still to be run: unfinished ones and new ones."""
        started = [t for t in self._trials() if t.state != TrialState.WAITING]
        return len(self._unfinished) + max(0, self.num_trials - len(started))

    @property
    def num_open(self) -> int:
        """How many trials have not ended, those never asked for included."""
        ended = sum(trial.state.is_finished() for trial in self._trials())
        return max(0, self.num_trials - ended)

    @property
    def num_complete(self) -> int:
        return sum(trial.state == TrialState.COMPLETE for trial in self._trials())

    def _trials(self) -> list[FrozenTrial]:
        return self._ledger.get_trials(deepcopy=False)

    def _settle(self, existing: list[FrozenTrial]) -> list[FrozenTrial]:
        """Tell what ended but was not told; return what has to go on."""
        unfinished = []
        for trial in existing:
            if trial.state == TrialState.RUNNING:
                result = self._folder.trial(trial.number).result()
                if result is None:
                    unfinished.append(trial)
                else:
                    self._tell(trial.number, result)
        return unfinished

    def suggest(self, trial_id: str) -> Any:
        while True:
            if trial_id not in self._ot_trials:
                if self._unfinished:
                    frozen = self._unfinished.pop(0)
                    trial = optuna.trial.Trial(self._ledger, frozen._trial_id)
                    self._ot_trials[trial_id] = trial
                elif self.num_suggestions == 0:
                    return Searcher.FINISHED
            try:
                return super().suggest(trial_id)
            except (ValueError, JobFailed) as error:  # what the space returned can't be trained
                number = self._ot_trials.pop(trial_id).number
                reason = in_one_paragraph(error)
                print(f"trial {number} is failed without training: {reason}", flush=True)
                result = failed_result(number, reason)
                write_json(self._folder.trial(number).result_file, result)
                self._tell(number, result)

    def _configure(self, trial: Any) -> dict[str, Any]:
        """The space, adapted: what Tune gets is where the trial's configuration stands."""
        folder = self._folder.trial(trial.number)
        try:
            config = configuration_of(self._study, trial)
        except ValueError as error:
            if "dynamic value space" not in str(error):
                raise
            raise ChangedSpace(
                "a resumed study must have the space it began with; this one offers other "
                f"choices than before: {error} Go back to that space, or use another --study name."
            ) from error
        declared, config = config, with_absolute_paths(config)
        if folder.config_file.exists() and folder.config() != config:
            changed = "; ".join(differences(folder.config(), config))
            raise ChangedSpace(
                "a resumed study must have the space it began with; trial "
                f"{folder.number} differs in {changed}. Go back to "
                "that space, or use another --study name."
            )
        write_json(folder.config_file, config)  # before the check: a refused trial is told, too
        require_possible_in(self._study, self._plans, declared)
        plan = self._plans.plan_for(config, self._pool)
        write_json(folder.plan_file, plan)
        return {
            "trial": trial.number,
            "folder": str(folder.path),
            "broker": self._pool.broker_name,
            "system": config.system,
            "r": config.plan.r,
            "adapter_parameters": self._plans.count(config, plan),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Optuna takes no intermediate values in a study of several objectives."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the ledger what the trial's folder says; one that has no result stays open."""
        number = self._ot_trials[trial_id].number
        ended = self._folder.trial(number).result()
        if ended is not None:
            self._tell(number, ended)

    def _tell(self, number: int, result: TrialResult) -> None:
        if result.state == "failed":
            self._ledger.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            return
        values = [result.value(objective.name) for objective in self._study.objectives]
        self._ledger.tell(number, values, skip_if_finished=True)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing for the copy that Tune writes for its own restore: ours starts at the ledger."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is durable by itself."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see :meth:`save`."""


def failed_result(number: int, error: str) -> TrialResult:
    """Of a trial that was refused before it ran."""
    return TrialResult(
        number=number,
        state="failed",
        metrics={},
        adapter_parameters=0,
        head_parameters=0,
        seconds=0.0,
        attempts=0,
        error=error,
    )


def _storage(folder: StudyFolder) -> JournalStorage:
    file = str(folder.journal)
    return JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file)))
