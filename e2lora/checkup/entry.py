"""From the words of a command line to a check-up: what ``jobs/doctor.py`` calls."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from e2lora.checkup import check_cluster
from e2lora.checkup.findings import Finding
from e2lora.cluster import connect, is_of_the_cluster
from e2lora.command import find_study, run_for_user, storage_folder
from e2lora.preflight import with_absolute_paths
from e2lora.search.plans import given_configurations, require_sound
from e2lora.text_table import text_table
from e2lora.tracking import default_tracking_uri
from e2lora.tracking.store import first_line, remedy_of, require_answer

WIDTH = 100


def doctor_command(space: str, storage: Path | None, stage: bool, may_grow: bool) -> int:
    """Check all that a study needs; prints a table. 0: it can run. 1: it can't. 2: unknown space.

    Args:
        stage: fetch the weights of hub models on every node.
        may_grow: an autoscaler brings nodes that are lacking.
    """
    return run_for_user(lambda: _examine(space, storage, stage, may_grow), "", is_of_the_cluster)


def _examine(space: str, given: Path | None, stage: bool, may_grow: bool) -> int:
    study = find_study(space)
    require_sound(study)
    configs = [with_absolute_paths(config) for config in given_configurations(study)]
    storage = storage_folder(given).expanduser().resolve()
    connect()
    findings = check_cluster(storage, configs, stage, may_grow)
    findings.append(_of_tracking(storage))
    print(as_table(findings))
    return int(any(finding.state == "error" for finding in findings))


def _of_tracking(storage: Path) -> Finding:
    uri = default_tracking_uri(storage)
    try:
        return Finding("MLflow", "ok", require_answer(uri))
    except Exception as error:  # each kind of store has its own; all mean the same here
        return Finding(
            "MLflow",
            "error",
            f"the tracking server must answer before a study starts: {first_line(error)}",
            remedy_of(error, "Start it, correct MLFLOW_TRACKING_URI, or unset it."),
        )


def as_table(findings: Sequence[Finding]) -> str:
    """A line for each, with its remedy below, and what it all comes to."""
    rows = []
    for finding in findings:
        text = textwrap.wrap(finding.said, WIDTH) + textwrap.wrap(finding.remedy, WIDTH)
        rows.append([finding.check, finding.state, "\n".join(text)])
    errors = sum(finding.state == "error" for finding in findings)
    warnings = sum(finding.state == "warning" for finding in findings)
    verdict = "a study can run" if not errors else f"a study can't run: {errors} error(s)"
    if warnings:
        verdict += f"; {warnings} warning(s)"
    return f"{text_table(['check', '', 'what was found'], rows)}\n{verdict}"
