"""A storage that fails for a while is waited for, and one that stays broken leaves nothing half."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage

from e2lora import patience
from e2lora.adapters.tensors import write_tensors
from e2lora.patience import is_storage_fault, patiently
from e2lora.records import write_text
from e2lora.search.journal import Journal
from e2lora.training.checkpoint import TrainState, load_checkpoint, save_checkpoint


def failing(times: int, code: int, then: Callable[..., Any]) -> Callable[..., Any]:
    """``then``, after it has failed so many times."""
    left = [times]

    def call(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return then(*arguments)

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ESTALE, errno.EIO, errno.EDQUOT])
def test_hiccup_of_the_storage_is_waited_for(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(2, code, os.fsync))
    write_text(tmp_path / "a.json", "whole")
    assert (tmp_path / "a.json").read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"], "no half file is left"


def test_other_errors_are_raised_at_once() -> None:
    called: list[int] = []

    def write() -> None:
        called.append(1)
        raise PermissionError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        patiently(write, seconds=60)
    assert len(called) == 1


def test_storage_that_stays_full_is_told_and_the_old_file_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(os, "fsync", failing(99, errno.ENOSPC, os.fsync))
    with pytest.raises(OSError, match="No space left") as raised:
        write_text(tmp_path / "a.json", "new")
    assert is_storage_fault(raised.value)
    assert (tmp_path / "a.json").read_text() == "old"


def test_fault_is_found_below_what_was_raised_of_it() -> None:
    error = RuntimeError("saving failed")
    error.__cause__ = OSError(errno.ESTALE, "stale handle")
    assert is_storage_fault(error)
    assert not is_storage_fault(RuntimeError("no"))


def test_tensors_that_find_no_room_are_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors raises an error of its own; a limit on files' sizes is met as a full disk is."""
    monkeypatch.setattr(patience, "PASSING", patience.PASSING | {errno.EFBIG})
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_tensors(tmp_path / "a", {"a": torch.zeros(4096)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert is_storage_fault(raised.value)


def test_checkpoint_that_finds_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    first = TrainState(1, "me", {"parameter/a": torch.ones(4)})
    save_checkpoint(tmp_path, first)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patience, "PATIENCE_SECONDS", 0.2)
        patched.setattr(os, "fsync", failing(99, errno.ENOSPC, os.fsync))
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, TrainState(2, "me", {"parameter/a": torch.zeros(4)}))
    kept = load_checkpoint(tmp_path, "me")
    assert kept is not None
    assert (kept.step, kept.tensors["parameter/a"].tolist()) == (1, [1.0] * 4)
    save_checkpoint(tmp_path, TrainState(2, "me", {"parameter/a": torch.zeros(4)}))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"], "and no half one"


# ---- the ledger -------------------------------------------------------------------------------


def ledger(file: Path) -> optuna.Study:
    storage = JournalStorage(Journal(str(file)))
    return optuna.create_study(storage=storage, study_name="s", load_if_exists=True)


def test_half_line_of_a_journal_is_taken_back_when_it_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "optuna.journal"
    ledger(file).tell(ledger(file).ask(), 1.0)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"op_code":4,"worker')
    again = ledger(file)
    assert [trial.value for trial in again.trials] == [1.0]
    again.tell(again.ask(), 2.0)
    assert [trial.value for trial in ledger(file).trials] == [1.0, 2.0]


def test_append_that_finds_no_room_leaves_a_journal_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "optuna.journal"
    study = ledger(file)
    study.tell(study.ask(), 1.0)
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.2)
    before = file.read_bytes()
    with monkeypatch.context() as full:  # what was written of the line stays in the file
        full.setattr(os, "fsync", failing(99, errno.ENOSPC, os.fsync))
        with pytest.raises(OSError, match="No space left"):
            study.ask()
    assert file.read_bytes() == before
    study = ledger(file)
    study.tell(study.ask(), 2.0)
    assert [trial.value for trial in study.trials] == [1.0, 2.0]
