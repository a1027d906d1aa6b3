"""What nodes say is judged: each fault is found, named with its nodes, and has a remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from e2lora.checkup.entry import as_table, doctor_command
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
from e2lora.checkup.node import Gpu, NodeFacts, facts_here, notes_missing, unreadable_here
from e2lora.cluster import Heard
from e2lora.command import storage_folder
from e2lora.config import GroupSpec
from tests.small import small_trial

SPEC = GroupSpec.of(small_trial().training)


def node(address: str, **given: Any) -> Heard[NodeFacts]:
    facts: dict[str, Any] = {
        "versions": {"Python": "3.11", "torch": "2.13.0", "ray": "2.60.0"},
        "code": "c0de",
        "note": f"note-{address}",
        "available_gib": 12.0,
        "storage_error": None,
        "storage_free_gib": 100.0,
    }
    changed = {name: given.pop(name) for name in list(given) if name in NodeFacts.model_fields}
    if "versions" in changed:
        changed["versions"] = facts["versions"] | changed["versions"]
    place: dict[str, Any] = {"is_head": False, "cpus": 8.0, "gpus": 0.0}
    return Heard(address, **(place | given), answer=NodeFacts(**(facts | changed)))


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_equal_nodes_are_well() -> None:
    heard = [node("10.0.0.1", is_head=True), node("10.0.0.2")]
    for findings in (
        of_answers(heard),
        of_versions(heard),
        of_storage("/shared", heard, {}),
        of_head(heard, 2),
        of_groups({SPEC: 4}, may_grow=False),
    ):
        assert only(findings).state == "ok"
        assert not only(findings).remedy


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"versions": {"torch": "2.12.1"}}, "torch .* is 2.13.0 on a, 2.12.1 on b and c"),
        ({"versions": {"Python": "3.12"}}, "Python .* is 3.11 on a, 3.12 on b and c"),
        ({"versions": {"ray": "missing"}}, "ray .* is 2.60.0 on a, missing on b and c"),
        ({"code": "01d"}, "code must be the same .* c0de on a, 01d on b and c"),
    ],
)
def test_versions_that_differ_are_named_with_their_nodes(
    changed: dict[str, Any], said: str
) -> None:
    finding = only(of_versions([node("a"), node("b", **changed), node("c", **changed)]))
    assert finding.state == "error"
    assert finding.remedy
    assert re.search(said, finding.said)


def test_local_builds_of_one_version_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2lora.checkup.node.version", lambda name: "2.13.0+cpu")
    assert set(_here().versions.values()) == {"3.11", "2.13.0"} | {_here().versions["Python"]}


def test_node_that_can_not_run_the_project_is_named_with_the_reason() -> None:
    lost = Heard("b", False, 8.0, 0.0, None, "ModuleNotFoundError: No module named 'e2lora'")
    finding = only(of_answers([node("a"), lost]))
    assert finding.state == "error"
    assert "b: ModuleNotFoundError" in finding.said
    assert "constraints.txt" in finding.remedy


def test_nodes_that_do_not_see_each_others_files_are_named() -> None:
    finding = only(of_storage("/data", [node("a"), node("b")], {"b": ["a"]}))
    assert finding.state == "error"
    assert "isn't seen from b (a)" in finding.said


def test_node_that_can_not_write_is_named_with_the_reason() -> None:
    heard = [node("a"), node("b", storage_error="PermissionError: denied")]
    finding = only(of_storage("/data", heard, {"b": ["a"]}))
    assert (finding.state, "b: PermissionError: denied" in finding.said) == ("error", True)


def test_little_room_is_a_warning_and_the_fullest_node_decides() -> None:
    finding = only(of_storage("/data", [node("a"), node("b", storage_free_gib=1.2)], {}))
    assert (finding.state, "1 GiB free" in finding.said) == ("warning", True)


def test_kind_of_group_that_does_not_fit_is_an_error_unless_nodes_may_come() -> None:
    wide = SPEC.model_copy(update={"num_workers": 64})
    lacking, coming = of_groups({wide: 0}, False) + of_groups({wide: 0}, True)
    assert (lacking.state, coming.state) == ("error", "warning")
    assert "64 worker(s) of 1 CPU" in lacking.said
    assert "num_workers" in lacking.remedy


GPU = Gpu(name="A100", capability=(8, 0), memory_gib=80.0)
OLD = Gpu(name="V100", capability=(7, 0), memory_gib=16.0)


@pytest.mark.parametrize(
    ("gpus", "fault", "precision", "state", "said"),
    [
        ((), "torch 2.13.0 is a build without CUDA", "fp32", "error", "b offers 1 .* without CUDA"),
        ((GPU,), None, "bf16", "ok", "A100 80 GiB"),
        ((OLD,), None, "bf16", "error", "bf16 needs .* b has V100"),
        ((OLD,), None, "fp16", "ok", "V100 16 GiB"),
    ],
)
def test_gpus_must_be_such_as_torch_can_use_in_the_precision(
    gpus: tuple[Gpu, ...], fault: str | None, precision: str, state: str, said: str
) -> None:
    facts = node("b", gpu_error=fault).answer
    assert facts is not None
    heard = Heard("b", False, 8.0, 1.0, facts.model_copy(update={"gpus": gpus}))
    finding = only(of_gpus([node("a"), heard], {precision}))
    assert finding.state == state
    assert re.search(said, finding.said)


def test_head_too_small_for_the_controllers_is_a_warning() -> None:
    head = node("a", is_head=True, available_gib=7.0)
    assert only(of_head([head], 7)).state == "ok"
    finding = only(of_head([head], 12))
    assert (finding.state, "12 trial(s) at once take 10.1 GiB" in finding.said) == ("warning", True)


def test_what_can_not_be_read_is_told_once_with_all_its_nodes() -> None:
    heard = [Heard(address, False, 1.0, 0.0, ["no such model"]) for address in "ab"]
    assert only(of_reading(heard, 1, False)).said == "no such model (on a, b)"


# ---- on this machine --------------------------------------------------------------------------


def _here(folder: Path = Path("/")) -> NodeFacts:
    return facts_here(str(folder), look_at_gpus=False)


def test_node_leaves_a_note_that_it_sees_itself(tmp_path: Path) -> None:
    facts = _here(tmp_path)
    assert facts.storage_error is None
    assert notes_missing(str(tmp_path), [facts.note, "of another"], patience=0) == ["of another"]
    assert (_here(tmp_path / "nowhere").storage_error or "").startswith("FileNotFoundError")


def test_model_and_data_that_are_not_there_are_told_with_what_to_do(tmp_path: Path) -> None:
    good = small_trial()
    model = good.model.model_copy(update={"name": str(tmp_path / "nothing")})
    data = good.task.model_copy(update={"data": str(tmp_path / "none.jsonl")})
    bad = [good.model_copy(update={"model": model}), good.model_copy(update={"task": data})]
    reasons = unreadable_here([config.model_dump_json() for config in [good, *bad]], stage=False)
    assert ["nothing" in reasons[0], "none.jsonl" in reasons[1]] == [True, True]


def test_place_in_an_object_store_is_refused_with_what_to_mount() -> None:
    with pytest.raises(ValueError, match=r"folder that all nodes share.*got a place on s3"):
        storage_folder(Path("s3://bucket/studies"))
    assert storage_folder(Path("/shared/studies")) == Path("/shared/studies")


def test_table_has_findings_with_remedies_and_what_they_come_to() -> None:
    table = as_table([Finding("a", "ok", "well"), Finding("b", "error", "broken", "Mend it.")])
    assert table.splitlines()[-3:] == [
        "b      error  broken",
        "              Mend it.",
        "a study can't run: 1 error(s)",
    ]


@pytest.mark.slow
def test_doctor_of_this_machine_finds_it_fit_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    try:
        assert doctor_command("search_spaces.quickstart", tmp_path / "results", False, False) == 0
    finally:
        ray.shutdown()
    said = capsys.readouterr().out
    assert said.rstrip().endswith("a study can run")
    for check in ("nodes", "groups", "versions", "storage", "models, data", "MLflow"):
        assert check in said
    assert list((tmp_path / "results").iterdir()) == []
