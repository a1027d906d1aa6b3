"""Published scores beside measured ones, with what differs between the two set-ups.

Of the publication only what its tables say is known here. Where nothing is known, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from e2lora.config import PromptsConfig, TrialConfig
from e2lora.published import (
    BASE_RANK,
    BENCHMARKS,
    SOURCE,
    Benchmark,
    Row,
    Source,
    is_model,
    is_task,
)
from e2lora.scored import Scored, Section
from e2lora.standings import Spread, runs_of
from e2lora.tables import Table

NEAR = 0.25  # of the published count: another size is another system

TestMetrics = Mapping[int, Mapping[str, float]]
"""Number of a run over seeds → its metrics on the test rows."""


@dataclass(frozen=True)
class Measured:
    """A system on one task, in per cent, by seed."""

    trial: Scored
    by_seed: Mapping[int, float]
    on_test_rows: bool


def published_tables(sections: Sequence[Section], tests: Sequence[TestMetrics]) -> list[Table]:
    """A table for each benchmark that the study has a task of.

    Args:
        tests: of each section.
    """
    pairs = [pair for pair in zip(sections, tests, strict=True) if pair[0].trials]
    tables = []
    for benchmark in BENCHMARKS:
        found = {
            task: pair
            for task, source in benchmark.sources.items()
            for pair in pairs
            if is_model(pair[0].model, benchmark.models)
            and is_task(pair[0].trials[0].config.task, task, source)
        }
        if found:
            tables.append(_table(benchmark, found))
    return tables


def _table(benchmark: Benchmark, found: Mapping[str, tuple[Section, TestMetrics]]) -> Table:
    missing = [task for task in benchmark.sources if task not in found]
    rows: list[tuple[str, ...]] = []
    used: list[Measured] = []
    for row in benchmark.rows:
        told = {
            task: _measure(section, tests, row, benchmark.sources[task])
            for task, (section, tests) in found.items()
        }
        measured = {task: m for task, m in told.items() if isinstance(m, Measured)}
        lacking = [m for m in told.values() if isinstance(m, str)]
        used += measured.values()
        printed = "" if row.parameters is None else f"{row.parameters / 1e6:.2f}M"
        first = (row.printed, printed, f"{row.value:.2f}")
        if lacking or missing:
            reasons = list(dict.fromkeys(lacking)) or ["no average: tasks are missing"]
            rows.append((*first, "", "", "", "; ".join([*reasons, *filter(None, [row.remark])])))
            continue
        rows.append((*first, *_side_by_side(row, list(measured.values()))))
    notes = [f"Published: {SOURCE}; in per cent.", *_set_up(benchmark, used)]
    if missing:
        parts = ", ".join(found)
        notes.append(
            f"Not in this study, so there is no average: {', '.join(missing)}. Has {parts}."
        )
    return Table(
        f"Published against measured: {benchmark.title}",
        ("system", "published size", "published", "size", "measured", "difference", "remarks"),
        tuple(rows),
        frozenset(("published size", "published", "size", "measured", "difference")),
        tuple(notes),
    )


def _measure(section: Section, tests: TestMetrics, row: Row, source: Source) -> Measured | str:
    """What the study has of a row; or why it has nothing."""
    pool = [t for t in section.trials if t.system == row.system]
    if not pool:
        return "not in this study"

    def distance(t: Scored) -> float:
        if row.parameters is not None:
            return abs(math.log(max(t.parameters, 1) / row.parameters))
        return abs(math.log((t.r or BASE_RANK) / BASE_RANK))

    least = min(map(distance, pool))
    if row.parameters is not None and least > math.log1p(NEAR):
        sizes = ", ".join(f"{n:,}" for n in sorted({t.parameters for t in pool}))
        return f"not at this size: has {sizes}"
    near = [t for t in pool if math.isclose(distance(t), least)]
    trial = section.best(lambda t: t in near and t.origin == "quota")
    trial = trial or section.best(lambda t: t in near)
    assert trial is not None
    runs = runs_of(section, trial)
    told = {run.config.seed: _percent(tests.get(run.number, {}), section, source) for run in runs}
    if told and None not in told.values():
        return Measured(trial, {s: v for s, v in told.items() if v is not None}, True)
    if section.metric.name not in (source.metric, "score"):
        return f"no {source.metric} yet: the search looks at {section.metric.name}"
    values = {run.config.seed: 100 * run.value for run in runs}
    return Measured(trial, values or {trial.config.seed: 100 * trial.value}, False)


def _percent(metrics: Mapping[str, float], section: Section, source: Source) -> float | None:
    names = (source.metric, "score") if section.metric.name == "score" else (source.metric,)
    found = [metrics[name] for name in names if name in metrics]
    return 100 * found[0] if found else None


def _side_by_side(row: Row, measured: Sequence[Measured]) -> tuple[str, str, str, str]:
    """Size, mean over tasks ± deviation over seeds, difference, remarks."""
    remarks = [row.remark] if row.remark else []
    trials = [m.trial for m in measured]
    size = fmean(t.parameters for t in trials)
    if row.parameters is not None and abs(size / row.parameters - 1) > 0.05:
        remarks.append(f"{100 * (size / row.parameters - 1):+.0f} % parameters")
    ranks = sorted({t.r for t in trials if t.r is not None})
    remarks.append(f"r = {', '.join(map(str, ranks))}" if ranks else "")
    told = f"{size / 1e6:.2f}M"
    seeds = set.intersection(*(set(m.by_seed) for m in measured))
    if not seeds:
        return told, "", "", "no average: the tasks have no seed in common"
    if len({m.on_test_rows for m in measured}) > 1:
        return told, "", "", "no average: some tasks have test scores, others don't yet"
    spread = Spread.of([fmean(m.by_seed[seed] for m in measured) for seed in sorted(seeds)])
    deviation = "" if math.isnan(spread.deviation) else f" ± {spread.deviation:.2f}"
    score = f"{spread.mean:.2f}{deviation} ({spread.n})"
    return told, score, f"{spread.mean - row.value:+.2f}", "; ".join(filter(None, remarks))


def _set_up(benchmark: Benchmark, measured: Sequence[Measured]) -> Iterable[str]:
    """What differs from the published set-up, or may, by the configurations that were run."""
    if not measured:
        return
    if not all(m.on_test_rows for m in measured):
        yield (
            "Measured on the validation rows that configurations were chosen by, not on test "
            "rows: such scores lean high."
        )
    seeds = {len(m.by_seed) for m in measured}
    if seeds == {1}:
        yield "Measured with one seed."
    elif seeds:
        yield f"In brackets: seeds; ±: standard deviation over them{_of_several(benchmark)}."
    configs = [m.trial.config for m in measured]
    wanted = ", ".join(benchmark.targets) or "every linear layer"
    targets = {
        c.adapter.target_modules
        for c in configs
        if c.adapter.family != "full" and set(c.adapter.target_modules) != set(benchmark.targets)
    }
    for names in sorted(targets):
        yield f"Adapters on {', '.join(names)} here; the published counts follow from {wanted}."
    of_e2 = [c.plan for c in configs if c.plan.topology == "e2"]
    if any(p.similarity == "rmi" and p.rank_allocation == "entropy_power" for p in of_e2):
        yield (
            "E² here cuts by rmi and allocates by entropy_power, which keep what was printed free "
            "of the loss's scale; as printed it is the preset e2_published."
        )
    yield (
        f"Trained here: {_several(configs, _length)}, {_several(configs, _optimisation)}; "
        f"{_several(configs, _limits)}. Of the published training no more than its scores is "
        "known here, so any of these may differ."
    )


def _of_several(benchmark: Benchmark) -> str:
    return " of the average over tasks" if len(benchmark.sources) > 1 else ""


def _several(configs: Sequence[TrialConfig], tell: Callable[[TrialConfig], str]) -> str:
    return " or ".join(sorted({tell(config) for config in configs}))


def _length(config: TrialConfig) -> str:
    training = config.training
    stop = ", early stopping" if training.early_stopping else ""
    if training.max_steps is not None:
        return f"{training.max_steps:,} steps of {training.global_batch_size}{stop}"
    return f"{training.num_epochs:g} epochs in batches of {training.global_batch_size}{stop}"


def _optimisation(config: TrialConfig) -> str:
    quantized = f" on {config.model.quantization} weights" if config.model.quantization else ""
    return f"{config.training.precision}{quantized}"


def _limits(config: TrialConfig) -> str:
    task = config.task
    length = getattr(task, "max_length", None)
    told = f"at most {length} tokens" if length else "whole inputs"
    if isinstance(task, PromptsConfig):
        told += f", {task.num_shots} example(s) in the prompt"
    return told
