"""A state on disk counts when it is whole, belongs to one trial, and knows no engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from e2lora.records import Evaluation
from e2lora.tasks.scores import RowScore
from e2lora.training import checkpoint
from e2lora.training.checkpoint import MARKER, TrainState, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def state(step: int = 3, identity: str = "trial a", **tensors: torch.Tensor) -> TrainState:
    generator = torch.Generator().manual_seed(step)
    name = "base_model.encoder.layer.0.lora_A.default.weight"
    return TrainState(
        step=step,
        identity=identity,
        tensors={
            **{
                f"{kind}/{name}": torch.randn(4, 8, generator=generator)
                for kind in ("parameter", "exp_avg", "exp_avg_sq")
            },
            **tensors,
        },
        history={"loss": [0.1 + i / 3 for i in range(step)]},
        evaluations=[Evaluation(step=step, metrics={"accuracy": 1 / 3, "loss": 0.7})],
        scores=[
            RowScore({"accuracy": 1.0}, 0.25, 1, "good", ["good", 1]),
            RowScore({"accuracy": 0.0}, 1.0, 2),
        ],
    )


def require_equal(loaded: TrainState | None, expected: TrainState) -> None:
    assert loaded is not None
    assert loaded.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor), name
    for field in ("step", "identity", "history", "evaluations", "scores"):
        assert getattr(loaded, field) == getattr(expected, field), "exact, no digit lost"


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    saved = state(
        5,
        scalar=torch.tensor(0.1, dtype=torch.float64),
        half=torch.randn(3).bfloat16(),
        empty=torch.zeros(0, 4),
    )
    save_checkpoint(tmp_path, saved)
    require_equal(load_checkpoint(tmp_path, "trial a"), saved)


def test_nothing_there_is_no_state(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, "trial a") is None
    assert load_checkpoint(tmp_path / "absent", "trial a") is None


def test_folder_without_marker_does_not_count(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(3), keep=2)
    save_checkpoint(tmp_path, state(6), keep=2)
    (tmp_path / "step-000006" / MARKER).unlink()
    require_equal(load_checkpoint(tmp_path, "trial a"), state(3))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last", ["write_tensors", "write_json", "_flush_to_disk"])
def test_save_that_is_killed_half_way_leaves_the_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Killed in each of its parts, before or after that part was done."""
    save_checkpoint(tmp_path, state(3))
    done = getattr(checkpoint, last)
    for finishes in (False, True):

        def killed(*args: Any, finishes: bool = finishes) -> None:
            if finishes:
                done(*args)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, last, killed)
            with pytest.raises(Killed):
                save_checkpoint(tmp_path, state(6))
        require_equal(load_checkpoint(tmp_path, "trial a"), state(3))
    save_checkpoint(tmp_path, state(6))
    require_equal(load_checkpoint(tmp_path, "trial a"), state(6))


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".step-000003.12345"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, state(6))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]


def test_kill_before_the_last_rename_leaves_the_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, state(3))

    def killed(self: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, state(6))
    require_equal(load_checkpoint(tmp_path, "trial a"), state(3))


def test_kill_before_the_older_is_removed_leaves_the_newer_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, state(3))

    def killed(folder: Path) -> list[Path]:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_complete", killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, state(6))
    require_equal(load_checkpoint(tmp_path, "trial a"), state(6))
    save_checkpoint(tmp_path, state(9))
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000009"]


@pytest.mark.parametrize("keep", [1, 2])
def test_newest_are_kept_and_older_removed(tmp_path: Path, keep: int) -> None:
    steps = [1, 9, 10, 100, 999_999, 1_000_000]
    for number, step in enumerate(steps, start=1):
        save_checkpoint(tmp_path, TrainState(step, "trial a", {}), keep=keep)
        loaded = load_checkpoint(tmp_path, "trial a")
        assert loaded is not None
        assert loaded.step == step
        assert len(list(tmp_path.iterdir())) == min(number, keep)


def test_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(3))
    again = state(3, extra=torch.ones(2))
    save_checkpoint(tmp_path, again)
    require_equal(load_checkpoint(tmp_path, "trial a"), again)


def test_state_of_another_trial_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(identity="trial a"))
    with pytest.raises(ValueError, match=r"written by trial a, this trial is trial b\. Use"):
        load_checkpoint(tmp_path, "trial b")


def test_state_is_read_without_the_engine_that_wrote_it(tmp_path: Path) -> None:
    """Names and tensors only: no pickle, no class, no number of workers."""
    save_checkpoint(tmp_path, state())
    files = {path.name for path in (tmp_path / "step-000003").iterdir()}
    assert files == {"state.safetensors", "state.json", MARKER}
    code = f"""
import sys
from pathlib import Path
from e2lora.training.checkpoint import load_checkpoint
assert load_checkpoint(Path({str(tmp_path)!r}), "trial a").step == 3
assert not [m for m in ("deepspeed", "ray", "transformers", "peft") if m in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
