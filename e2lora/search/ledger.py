"""The study's Optuna storage is its only ledger: this searcher keeps Tune in step with it.

A trial is asked for, written to its folder (suggestion.json, trial.json, plan.json), run, and told
from its result.json. Whatever is killed in between, the ledger and the folders say where to go on.
What needs no training is answered at once: a suggestion over the study's limit of parameters, or
one that comes to a trial there is already. Such a suggestion is no trial: only the ledger has it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from e2lora.config import Study, TrialConfig, fingerprint_of, in_one_paragraph
from e2lora.masking import holds_password, without_passwords
from e2lora.plan import SharingPlan
from e2lora.pool import JobFailed, Pool
from e2lora.preflight import Plans, with_absolute_paths
from e2lora.records import StudyFolder, Suggestion, TrialFolder, TrialResult, write_json
from e2lora.search.journal import Journal
from e2lora.search.plans import configuration_of, require_possible_in
from e2lora.search.samplers import sampler_of
from e2lora.search.unchanged import ChangedSpace, require_same

MODES = {"maximize": "max", "minimize": "min"}
MOST_ANSWERED = 50
"""Suggestions in a row that needed no training: there is nothing new to be had."""
ANSWERED, TWIN_OF, ORIGIN, RETRY_OF = "answered", "twin_of", "origin", "retry_of"
"""Attributes of trials in the ledger."""
WORTH_A_RETRY = ("memory", "error", "lost")
"""Failures that another machine, or another day, may not have."""


class Answered(Exception):
    """A suggestion that needs no training. ``twin``: the trial that it comes to."""

    def __init__(self, reason: str, twin: int | None = None) -> None:
        super().__init__(reason)
        self.twin = twin


class LedgerSearch(OptunaSearch):
    """OptunaSearch over spaces that return a :class:`TrialConfig`, on durable storage.

    Trials of an earlier run come first, under their own numbers: those that have not ended, and
    those that have but of which Tune, killed, kept no record; then the quota of every cell and the
    study's points; then the sampler's, until ``num_trials`` exist.

    Args:
        num_trials: None: those that the study gives, and those that are there already.
        storage: an RDB's URL; None: a journal in the study's folder.
        open_slots: how many trials can run at once now.
        is_over: whether no further trial is to begin.
        origin: of the study's points.
        retry_failed: give trials another number that failed for want of memory, by an error, or by
            losing every attempt.
    """

    def __init__(
        self,
        study: Study,
        folder: StudyFolder,
        plans: Plans,
        pool: Pool,
        num_trials: int | None,
        storage: str | None = None,
        open_slots: Callable[[], int] = lambda: 1,
        is_over: Callable[[], bool] = lambda: False,
        origin: Literal["point", "seeds"] = "point",
        retry_failed: bool = False,
    ) -> None:
        self._study, self._folder, self._plans, self._pool = study, folder, plans, pool
        self._num_trials, self._open_slots, self._is_over = num_trials, open_slots, is_over
        folder.path.mkdir(parents=True, exist_ok=True)
        super().__init__(
            space=self._configure,
            metric=[objective.name for objective in study.objectives],
            mode=[MODES[objective.direction] for objective in study.objectives],
            study_name=folder.name if storage is None else str(folder.path),
            storage=_storage(folder, storage),
        )
        ledger: Any = self._ot_study
        self._ledger: optuna.Study = ledger
        existing = self._trials()
        started = sum(trial.state != TrialState.WAITING for trial in existing)
        # seeded by how far the study is, so that a resumed sampler doesn't repeat itself
        self._ledger.sampler = sampler_of(study.sampler, study.seeds[0] + started)
        self._enqueue("quota", study.quota)
        self._enqueue(origin, study.points)
        if retry_failed:
            self._enqueue_failed()
        self._running: set[str] = set()  # Tune's names of trials that it has and that go on
        self._answered_in_a_row = 0
        self._known = _identities(folder)
        self._twins: dict[int, list[int]] = {}
        self._unfinished = self._settle(existing)
        self._unrecorded = self._ended_without_record()

    # ---- how far it is ------------------------------------------------------------------------

    @property
    def num_trials(self) -> int:
        """How many there shall be in all; what is tried again counts twice."""
        if self._num_trials is None:
            return len(self._of_study())
        return self._num_trials + len(self._retried())

    @property
    def num_to_run(self) -> int:
        """Unfinished trials and new ones."""
        started = [t for t in self._of_study() if t.state != TrialState.WAITING]
        return len(self._unfinished) + max(0, self.num_trials - len(started))

    @property
    def num_suggestions(self) -> int:
        """How many trials Tune is still to be given: some it only has to record."""
        return len(self._unrecorded) + self.num_to_run

    @property
    def num_open(self) -> int:
        """How many trials have not ended, those never asked for included."""
        if self.is_exhausted:
            return sum(trial.state == TrialState.RUNNING for trial in self._of_study())
        return max(0, self.num_trials - self.num_ended)

    @property
    def num_ended(self) -> int:
        """In whatever way."""
        return sum(trial.state.is_finished() for trial in self._of_study())

    @property
    def num_failed(self) -> int:
        """Those that were tried again since are left out."""
        failed = {t.number for t in self._of_study() if t.state == TrialState.FAIL}
        return len(failed - self._retried())

    @property
    def num_complete(self) -> int:
        return sum(trial.state == TrialState.COMPLETE for trial in self._of_study())

    @property
    def is_exhausted(self) -> bool:
        """Whether the sampler found nothing new in a long row of suggestions."""
        return self._answered_in_a_row >= MOST_ANSWERED

    def _trials(self) -> list[FrozenTrial]:
        return self._ledger.get_trials(deepcopy=False)

    def _of_study(self) -> list[FrozenTrial]:
        """Without suggestions that were answered."""
        return [trial for trial in self._trials() if ANSWERED not in trial.user_attrs]

    def _retried(self) -> set[int]:
        return {t.user_attrs[RETRY_OF] for t in self._trials() if RETRY_OF in t.user_attrs}

    # ---- suggestions --------------------------------------------------------------------------

    def _enqueue_failed(self) -> None:
        retried = self._retried()
        for trial in self._of_study():
            result = self._folder.trial(trial.number).result()
            if result and result.failure in WORTH_A_RETRY and trial.number not in retried:
                origin = trial.user_attrs.get(ORIGIN, "sampler")
                attributes = {ORIGIN: origin, RETRY_OF: trial.number}
                self._ledger.enqueue_trial(trial.params, user_attrs=attributes)

    def _enqueue(self, origin: str, points: Any) -> None:
        known = {_key(t.system_attrs.get("fixed_params", t.params)) for t in self._trials()}
        for point in points:
            if _key(point) not in known:
                known.add(_key(point))
                self._ledger.enqueue_trial(dict(point), user_attrs={ORIGIN: origin})

    def suggest(self, trial_id: str) -> Any:
        if self._unrecorded:
            return self._to_record(trial_id, self._unrecorded.pop(0))
        if self._unfinished:
            frozen = self._unfinished.pop(0)
            self._ot_trials[trial_id] = optuna.trial.Trial(self._ledger, frozen._trial_id)
        elif len(self._running) >= self._open_slots():  # first: Tune asks many times a second
            return None  # asked again soon: the later, the more the sampler knows
        elif self.num_to_run == 0 or self._is_over() or self.is_exhausted:
            return Searcher.FINISHED
        while True:
            try:
                suggestion = super().suggest(trial_id)
            except Answered as answer:
                self._answer(self._ot_trials.pop(trial_id), answer)
            except (ValueError, JobFailed) as error:  # what the space returned can't be trained
                number = self._ot_trials.pop(trial_id).number
                reason = in_one_paragraph(error)
                print(f"trial {number} is failed without training: {reason}", flush=True)
                result = failed_result(number, reason)
                write_json(self._folder.trial(number).result_file, result)
                self._tell(number, result)
            else:
                self._answered_in_a_row = 0
                self._running.add(trial_id)
                return suggestion
            if self.num_suggestions == 0 or self._is_over() or self.is_exhausted:
                return Searcher.FINISHED

    def _to_record(self, trial_id: str, ended: FrozenTrial) -> dict[str, Any]:
        """For Tune, a trial that has ended: nothing of it is decided, checked or run again."""
        self._ot_trials[trial_id] = optuna.trial.Trial(self._ledger, ended._trial_id)
        folder = self._folder.trial(ended.number)
        result = folder.result()
        assert result is not None, f"{folder.path} has ended in the ledger, and has no result"
        return {
            "trial": ended.number,
            "folder": str(folder.path),
            "adapter_parameters": result.adapter_parameters,
        }

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
        if folder.config_file.exists():
            require_same(folder, config)
        else:  # before the check: a refused trial is told, too
            write_json(folder.config_file, config)
        suggestion = self._suggestion(trial)
        write_json(folder.suggestion_file, suggestion)
        require_possible_in(self._study, self._plans, declared)
        config, plan = self._plans.planned(config, self._pool)
        parameters = self._plans.count(config, plan)
        identity = _identity(config, plan)
        if not folder.plan_file.exists():  # else it goes on
            self._require_worth_training(folder, parameters, identity)
        self._known[identity] = trial.number
        write_json(folder.config_file, config)
        write_json(folder.suggestion_file, suggestion.model_copy(update={"identity": identity}))
        write_json(folder.plan_file, plan)
        pruner = self._study.pruner if suggestion.origin == "sampler" else None
        return {
            "trial": trial.number,
            "folder": str(folder.path),
            "broker": self._pool.broker_name,
            "adapter_parameters": parameters,
            "num_steps": self._plans.num_steps(config),
            "pruner": pruner and pruner.model_dump(),
            "metric": self._pruned_by(),
        }

    def _suggestion(self, trial: Any) -> Suggestion:
        origin = trial.user_attrs.get(ORIGIN, "sampler")
        chosen = trial.params["trial"] if origin == "seeds" else None
        return Suggestion(origin=origin, params=dict(trial.params), chosen=chosen)

    def _pruned_by(self) -> dict[str, str]:
        """The first objective that is a metric, which the pruner looks at."""
        objectives = [o for o in self._study.objectives if o.name != "adapter_parameters"]
        return objectives[0].model_dump() if objectives else {}

    def _require_worth_training(self, folder: TrialFolder, parameters: int, identity: str) -> None:
        """
        Raises:
            Answered: the result is known beforehand. Nothing is left of the trial's folder.
        """
        most, twin = self._study.max_parameters, self._known.get(identity)
        if most is not None and parameters > most:
            answer = Answered(f"{parameters:,} adapter parameters exceed the limit of {most:,}")
        elif twin is not None and twin != folder.number:
            answer = Answered(f"the same plan and options as trial {twin}", twin)
        else:
            return
        folder.suggestion_file.unlink()
        folder.config_file.unlink()
        folder.path.rmdir()
        raise answer

    # ---- answers ------------------------------------------------------------------------------

    def _answer(self, trial: Any, answer: Answered) -> None:
        """Tell the ledger at once, or when the trial that this one comes to has ended."""
        self._answered_in_a_row += 1
        trial.set_user_attr(ANSWERED, str(answer))
        if answer.twin is None:  # worse than any that was trained, and no value that is a lie
            self._ledger.tell(trial.number, state=TrialState.PRUNED)
        else:
            trial.set_user_attr(TWIN_OF, answer.twin)
            self._tell_twin(trial.number, answer.twin)
        self._write_answered()
        if self.is_exhausted:
            print(
                f"the last {MOST_ANSWERED} suggestions needed no training ({answer}): the space "
                "has nothing new to offer, and the search ends here",
                flush=True,
            )

    def _tell_twin(self, number: int, original: int) -> None:
        result = self._folder.trial(original).result()
        if result is None:
            self._twins.setdefault(original, []).append(number)
        else:
            self._tell(number, result)

    def _write_answered(self) -> None:
        answered = [
            {"number": t.number, "reason": t.user_attrs[ANSWERED], "params": t.params}
            for t in self._trials()
            if ANSWERED in t.user_attrs
        ]
        write_json(self._folder.answered_file, answered)

    def _settle(self, existing: list[FrozenTrial]) -> list[FrozenTrial]:
        """Tell what ended but was not told; return what has to go on."""
        unfinished = []
        for trial in existing:
            if trial.state != TrialState.RUNNING:
                continue
            if TWIN_OF in trial.user_attrs:
                self._tell_twin(trial.number, trial.user_attrs[TWIN_OF])
            elif (result := self._folder.trial(trial.number).result()) is not None:
                self._tell(trial.number, result)
            else:
                unfinished.append(trial)
        return unfinished

    def _ended_without_record(self) -> list[FrozenTrial]:
        """Refused trials never come to Tune: they have no plan."""
        return [
            trial
            for trial in self._of_study()
            if trial.state.is_finished()
            and self._folder.trial(trial.number).plan_file.exists()
            and self._folder.trial(trial.number).result_file.exists()
            and not self._folder.tune_trial(trial.number).exists()
        ]

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Optuna takes no intermediate values in a study of several objectives."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the ledger what the trial's folder says; one that has no result stays open."""
        self._running.discard(trial_id)
        number = self._ot_trials[trial_id].number
        ended = self._folder.trial(number).result()
        if ended is not None:
            self._tell(number, ended)
            for twin in self._twins.pop(number, []):
                self._tell(twin, ended)

    def _tell(self, number: int, result: TrialResult) -> None:
        """A stopped trial has no values for the sampler: they would be those of another effort."""
        if result.state == "complete":
            values = [result.value(objective.name) for objective in self._study.objectives]
            self._ledger.tell(number, values, skip_if_finished=True)
        else:
            state = TrialState.FAIL if result.state == "failed" else TrialState.PRUNED
            self._ledger.tell(number, state=state, skip_if_finished=True)

    # ---- Tune's own copies --------------------------------------------------------------------

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
        failure="refused",
        metrics={},
        adapter_parameters=0,
        head_parameters=0,
        seconds=0.0,
        attempts=0,
        error=error,
    )


def _key(params: Any) -> str:
    return fingerprint_of({name: repr(value) for name, value in params.items()})


def _identity(config: TrialConfig, plan: SharingPlan) -> str:
    return fingerprint_of([config.identity(), plan.fingerprint()])


def _identities(folder: StudyFolder) -> dict[str, int]:
    """Of the trials there are → their numbers."""
    return {
        trial.suggestion().identity: trial.number
        for trial in folder.trial_folders()
        if trial.plan_file.exists()
        and not ((result := trial.result()) and result.failure in WORTH_A_RETRY)
    }


def _storage(folder: StudyFolder, url: str | None) -> BaseStorage:
    """
    Raises:
        ValueError: a database that can't be used.
    """
    if url is None:
        return JournalStorage(Journal(str(folder.journal)))
    if holds_password(url):
        raise ValueError(
            "--ledger stands on a command line, which Ray keeps and shows, so it must hold no "
            f"password; got {without_passwords(url)!r}. Give it by ~/.pgpass or PGPASSWORD."
        )
    try:
        return RDBStorage(url)
    except Exception as error:  # of SQLAlchemy, of its drivers, of Optuna
        raise ValueError(
            f"--ledger must be a database that Optuna can use; got {url.partition('://')[0]}://…: "
            f"{str(error).splitlines()[0]} Correct the URL, install the database's driver, or "
            "leave it out: the ledger is then a journal in the study's folder."
        ) from error
