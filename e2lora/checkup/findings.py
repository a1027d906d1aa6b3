"""From what nodes say to findings: what is well, what is not, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from e2lora.checkup.node import NodeFacts
from e2lora.cluster import Heard
from e2lora.config import GroupSpec

DRIVER_GIB, GROUP_GIB, TRIAL_GIB = 1.0, 0.62, 0.13
"""Main memory on the head (proportional set sizes, Ray 2.60): the study's own process; the
controller of each worker group and its helpers; the watcher of each running trial."""
LITTLE_SPACE_GIB = 5.0
FIRST_WITH_BF16 = (8, 0)


@dataclass(frozen=True)
class Finding:
    """One line of a check-up. ``error``: a study would fail; ``warning``: it might."""

    check: str
    state: Literal["ok", "warning", "error"]
    said: str
    remedy: str = ""


def of_answers(heard: Sequence[Heard[Any]]) -> list[Finding]:
    """Every node must be able to run the project at all."""
    silent = [f"{one.address}: {one.error}" for one in heard if one.error]
    if silent:
        return [
            Finding(
                "nodes",
                "error",
                "; ".join(silent),
                "Install the project and constraints.txt on every node, for the Python that Ray "
                "runs there; a submitted job brings its own code, not its packages.",
            )
        ]
    heads = [one for one in heard if one.is_head]
    parts = [f"{one.address} {_size(one)}{' (head)' if one in heads else ''}" for one in heard]
    return [Finding("nodes", "ok", ", ".join(parts))]


def _size(one: Heard[Any]) -> str:
    gpus = f" + {one.gpus:g} GPU" if one.gpus else ""
    return f"{one.cpus:g} CPU{gpus}"


def of_groups(slots: Mapping[GroupSpec, int], may_grow: bool) -> list[Finding]:
    """Each kind of worker group that the study's trials need must fit.

    Args:
        slots: kind → how many at once, on the nodes that are there.
        may_grow: an autoscaler brings nodes that are lacking.
    """
    findings = []
    for spec, count in slots.items():
        asked = (
            f"{spec.num_workers} worker(s) of {spec.cpus_per_worker:g} CPU and "
            f"{spec.gpus_per_worker:g} GPU"
        )
        if count:
            findings.append(Finding("groups", "ok", f"{asked}: {count} at once"))
        elif may_grow:
            said = f"{asked}: none now, an autoscaler is to bring the nodes"
            findings.append(Finding("groups", "warning", said, "See that its limits allow them."))
        else:
            findings.append(
                Finding(
                    "groups",
                    "error",
                    f"{asked}: not one fits",
                    "Lower `num_workers`, `cpus_per_worker` or `gpus_per_worker`, add nodes, or "
                    "give --may-grow where an autoscaler brings them.",
                )
            )
    return findings


def of_versions(heard: Sequence[Heard[NodeFacts]]) -> list[Finding]:
    """What decides numbers must be the same everywhere: trials go to any node."""
    answers = [(one.address, one.answer) for one in heard if one.answer]
    if not answers:
        return []
    findings = []
    for name in answers[0][1].versions:
        places = _places(answers, lambda facts, name=name: facts.versions[name])
        if len(places) > 1:
            findings.append(
                Finding(
                    "versions",
                    "error",
                    f"{name} must be the same on all nodes; it is {_told(places)}",
                    "Install from constraints.txt on every node.",
                )
            )
        elif "missing" in places:
            findings.append(
                Finding("versions", "error", f"{name} is missing", "Install from constraints.txt.")
            )
    codes = _places(answers, lambda facts: facts.code)
    if len(codes) > 1:
        findings.append(
            Finding(
                "versions",
                "error",
                f"the project's own code must be the same on all nodes; it is {_told(codes)}",
                "Submit the job with --working-dir ., or bring all nodes to one commit.",
            )
        )
    if not findings:
        known = answers[0][1].versions
        said = ", ".join(f"{name} {known[name]}" for name in ("Python", "torch", "ray"))
        findings.append(Finding("versions", "ok", f"{said} … are equal on {len(answers)} node(s)"))
    return findings


def _places(answers: Sequence[tuple[str, NodeFacts]], value: Any) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for address, facts in answers:
        places.setdefault(value(facts), []).append(address)
    return places


def _told(places: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{value} on {' and '.join(where)}" for value, where in places.items())


def of_storage(
    storage: str, heard: Sequence[Heard[NodeFacts]], blind: Mapping[str, Sequence[str]]
) -> list[Finding]:
    """All nodes must write to the storage path, and see what others write there.

    Args:
        blind: node → the nodes whose notes it doesn't see.
    """
    answers = {one.address: one.answer for one in heard if one.answer}
    failed = [f"{a}: {f.storage_error}" for a, f in answers.items() if f.storage_error]
    if failed:
        return [
            Finding(
                "storage",
                "error",
                f"all nodes must be able to write to {storage}; {'; '.join(failed)}",
                "Mount it on every node under this path, writable for the user that Ray runs as.",
            )
        ]
    if blind:
        said = ", ".join(f"{node} ({', '.join(others)})" for node, others in blind.items())
        return [
            Finding(
                "storage",
                "error",
                f"on several nodes, all must share the storage path; what is written to {storage} "
                f"isn't seen from {said}",
                "Give --storage a folder on a shared file system (NFS, EFS, …).",
            )
        ]
    free = min((facts.storage_free_gib for facts in answers.values()), default=0.0)
    seen = f"{storage} is written and seen by {len(answers)} node(s), {free:,.0f} GiB free"
    if free < LITTLE_SPACE_GIB:
        return [Finding("storage", "warning", seen, "Make room: a full disk stops the study.")]
    return [Finding("storage", "ok", seen)]


def of_gpus(heard: Sequence[Heard[NodeFacts]], precisions: set[str]) -> list[Finding]:
    """Nodes that offer GPUs to Ray must have such as torch can use, in the study's precisions."""
    findings: list[Finding] = []
    for one in heard:
        if not (one.answer and one.gpus):
            continue
        facts = one.answer
        weak = [gpu.name for gpu in facts.gpus if gpu.capability < FIRST_WITH_BF16]
        if facts.gpu_error:
            findings.append(
                Finding(
                    "GPUs",
                    "error",
                    f"{one.address} offers {one.gpus:g} GPU(s), and {facts.gpu_error}",
                    "Install there torch's build for its CUDA version, and the driver.",
                )
            )
        elif "bf16" in precisions and weak:
            findings.append(
                Finding(
                    "GPUs",
                    "error",
                    f"bf16 needs compute capability 8.0; {one.address} has {', '.join(weak)}",
                    "Use precision='fp16' or 'fp32', or other GPUs.",
                )
            )
        else:
            names = ", ".join(f"{gpu.name} {gpu.memory_gib:.0f} GiB" for gpu in facts.gpus)
            findings.append(Finding("GPUs", "ok", f"{one.address}: {names}"))
    return findings


def of_head(heard: Sequence[Heard[NodeFacts]], num_groups: int) -> list[Finding]:
    """The head must have memory for the study's process, all groups' controllers, all watchers."""
    needed = DRIVER_GIB + num_groups * GROUP_GIB + (num_groups + 1) * TRIAL_GIB
    for one in heard:
        if one.is_head and one.answer:
            said = (
                f"{num_groups} trial(s) at once take {needed:.1f} GiB there beside the workers, "
                f"{one.answer.available_gib:.1f} GiB are free"
            )
            if needed > one.answer.available_gib:
                remedy = "Take a larger head node, or larger trials on fewer groups."
                return [Finding("head memory", "warning", said, remedy)]
            return [Finding("head memory", "ok", said)]
    return []


def of_reading(heard: Sequence[Heard[list[str]]], num_pairs: int, staged: bool) -> list[Finding]:
    """Every node must be able to read each model and each task's data."""
    reasons: dict[str, list[str]] = {}
    for one in heard:
        for reason in one.answer or ():
            reasons.setdefault(reason, []).append(one.address)
    if not reasons:
        count = sum(one.answer is not None for one in heard)
        what = "readable, weights staged" if staged else "readable"
        said = f"{num_pairs} model(s) with their data are {what} on {count} node(s)"
        return [Finding("models, data", "ok", said)]
    return [
        Finding("models, data", "error", f"{reason} (on {', '.join(where)})")
        for reason, where in reasons.items()
    ]
