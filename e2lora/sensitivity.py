"""How much the learning rate decides: each system's score at each rate of the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from e2lora.scored import Scored, Section, Unscored
from e2lora.tables import Table

MOST_RATES = 8  # columns of a table; a sampler's rates are all different


@dataclass(frozen=True)
class Sweep:
    """One system at one size over the grid of learning rates.

    Attributes:
        size: the budget, or the base rank where there is none.
        scores: learning rate → the best complete trial there; None where every one diverged.
    """

    system: str
    size: str
    scores: dict[float, Scored | None]
    direction: str

    @property
    def complete(self) -> dict[float, Scored]:
        return {rate: trial for rate, trial in self.scores.items() if trial is not None}

    @property
    def range(self) -> float:
        """From the worst to the best."""
        values = [trial.value for trial in self.complete.values()]
        return max(values) - min(values)

    @property
    def note(self) -> str:
        """Whether the choice of a rate matters here, and whether the grid holds the best one.

        ``flat``: the range is within half the width of the best trial's 95 % interval over items.
        """
        sign = 1 if self.direction == "maximize" else -1
        highest = max(sign * trial.value for trial in self.complete.values())
        best = [rate for rate, t in self.complete.items() if sign * t.value == highest]
        notes = []
        interval = self.complete[best[0]].interval
        flat = interval is not None and self.range <= (interval.high - interval.low) / 2
        if len(self.scores) > 1 and flat:
            notes.append("flat")
        elif set(best) == {min(self.scores)} or set(best) == {max(self.scores)}:
            end = "lowest" if best[0] == min(self.scores) else "highest"
            if len(self.scores) > 1:
                notes.append(f"at the edge of the grid ({end})")
        if len(self.complete) < len(self.scores):
            notes.append(
                "diverged: " + ", ".join(_rate(r) for r, t in self.scores.items() if not t)
            )
        return "; ".join(notes)


def sweeps(section: Section) -> list[Sweep]:
    """By system, then by size; only those with two rates or more that have a complete trial.

    Of trials of the quota; in a study without one, of all trials at rates that two systems share.
    """
    trials: Sequence[Scored | Unscored] = [*section.trials, *section.unscored]
    if any(t.origin == "quota" for t in trials):
        trials = [t for t in trials if t.origin == "quota"]
    else:
        users: dict[float, set[str]] = {}
        for t in trials:
            users.setdefault(_rate_of(t), set()).add(t.config.system)
        trials = [t for t in trials if len(users[_rate_of(t)]) > 1]
    trials = [t for t in trials if isinstance(t, Scored) or t.is_effort]
    keys = sorted({(t.config.system, _size(t)) for t in trials}, key=_by_name)
    found = []
    for system, size in keys:
        mine = [t for t in trials if (t.config.system, _size(t)) == (system, size)]
        scores = {
            rate: _best(section, [t for t in mine if _rate_of(t) == rate])
            for rate in sorted({_rate_of(t) for t in mine})
        }
        sweep = Sweep(system, _told(size), scores, section.metric.direction)
        found += [sweep] if len(scores) > 1 and sweep.complete else []
    return found


def _best(section: Section, trials: Sequence[Scored | Unscored]) -> Scored | None:
    numbers = {t.number for t in trials if isinstance(t, Scored)}
    return section.best(lambda t: t.number in numbers)


def _rate_of(t: Scored | Unscored) -> float:
    return t.config.training.learning_rate


def _size(t: Scored | Unscored) -> tuple[int, int]:
    plan = t.config.plan
    budget = plan.target_parameters
    return (budget, 0) if budget is not None else (0, t.config.base_rank or 0)


def _told(size: tuple[int, int]) -> str:
    budget, r = size
    return f"{budget:,}" if budget else f"r={r}" if r else "all"


def _by_name(key: tuple[str, tuple[int, int]]) -> tuple[str, tuple[int, int]]:
    return key[0].casefold(), key[1]


def _rate(value: float) -> str:
    return f"{value:.3g}"


def sensitivity_table(section: Section) -> Table | None:
    """None where no system was tried at two learning rates."""
    found = sweeps(section)
    if not found:
        return None
    rates = sorted({rate for sweep in found for rate in sweep.scores})
    if len(rates) > MOST_RATES:
        rates = []
    rows = []
    for place, sweep in enumerate(found):
        first = sweep.system if place == 0 or found[place - 1].system != sweep.system else ""
        cells = [_cell(sweep, rate) for rate in rates]
        rows.append((first, sweep.size, *cells, f"{sweep.range:.4f}", sweep.note))
    notes = [
        f"{section.metric.name} of one seed at each learning rate. range: best minus worst of the "
        "complete trials. flat: within half the 95 % interval of the best one over items."
    ]
    if any("edge" in sweep.note for sweep in found):
        notes.append(
            "At the edge of the grid: a rate beyond it might do better, so that system may be "
            "worth more than it shows. Widen the grid before concluding."
        )
    header = ("system", "budget", *map(_rate, rates), "range", "note")
    numbers = frozenset(("budget", "range", *map(_rate, rates)))
    return Table("Sensitivity to the learning rate", header, tuple(rows), numbers, tuple(notes))


def _cell(sweep: Sweep, rate: float) -> str:
    if rate not in sweep.scores:
        return "–"
    trial = sweep.scores[rate]
    return "diverged" if trial is None else f"{trial.value:.4f}"
