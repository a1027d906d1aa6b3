"""Whether a cluster can run a study: its nodes are asked, and what they say is judged.

The search asks what is cheap before it starts (:func:`require_sound_cluster`); `jobs/doctor.py`
asks everything.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from e2lora.broker import affinity_of
from e2lora.checkup.findings import (
    Finding,
    of_answers,
    of_gpus,
    of_groups,
    of_head,
    of_reading,
    of_storage,
    of_versions,
)
from e2lora.checkup.node import NodeFacts, facts_here, notes_missing, unreadable_here
from e2lora.cluster import Heard, on_every_node, slots
from e2lora.config import GroupSpec, TrialConfig


def require_sound_cluster(storage: Path, kinds: Sequence[GroupSpec]) -> None:
    """What can be asked in a second or two: versions, code, storage, memory of the head.

    Prints what might go wrong.

    Raises:
        ValueError: what would; with all of it.
    """
    heard, findings = ask_nodes(storage, look_at_gpus=False)
    findings += of_head(heard, max(map(slots, kinds), default=0))
    errors = [finding for finding in findings if finding.state == "error"]
    if errors:
        raise ValueError(" ".join(f"{e.said}. {e.remedy}" for e in errors))
    for finding in findings:
        if finding.state == "warning":
            print(f"warning: {finding.said}. {finding.remedy}", file=sys.stderr, flush=True)


def ask_nodes(storage: Path, look_at_gpus: bool) -> tuple[list[Heard[NodeFacts]], list[Finding]]:
    """What every node is, and what follows for nodes, versions and storage."""
    with _passing_folder(storage) as folder:
        heard = on_every_node(facts_here, str(folder), look_at_gpus)
        notes = {one.answer.note: one.address for one in heard if one.answer}
        looked = on_every_node(notes_missing, str(folder), list(notes))
    blind = {one.address: [notes[note] for note in one.answer] for one in looked if one.answer}
    findings = [*of_answers(heard), *of_versions(heard), *of_storage(str(storage), heard, blind)]
    return heard, findings


def check_cluster(
    storage: Path, configs: Sequence[TrialConfig], stage: bool = False, may_grow: bool = False
) -> list[Finding]:
    """Everything, for trials of these configurations.

    Args:
        stage: fetch the weights of hub models on every node.
        may_grow: an autoscaler brings nodes that are lacking.
    """
    kinds = dict.fromkeys(GroupSpec.of(config.training) for config in configs)
    room = {kind: slots(kind) for kind in kinds}
    on_gpus = any(kind.gpus_per_worker for kind in kinds)
    heard, findings = ask_nodes(storage, look_at_gpus=on_gpus)
    findings += of_groups(room, may_grow)
    if on_gpus:
        findings += of_gpus(heard, {kind.precision for kind in kinds})
    findings += of_head(heard, max(room.values(), default=0))
    pairs = {affinity_of(config): config.model_dump_json() for config in configs}
    read = on_every_node(unreadable_here, list(pairs.values()), stage, seconds=3600.0)
    return findings + of_reading(read, len(pairs), stage)


@contextmanager
def _passing_folder(storage: Path) -> Iterator[Path]:
    """For the nodes' notes; gone afterwards. The storage folder is made if it isn't there."""
    folder = storage / f".checkup-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        for note in folder.iterdir():
            note.unlink(missing_ok=True)
        folder.rmdir()
