"""The benchmarks run, and the docs show what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_sft import tiny_llama

DOCS = (ROOT / "docs" / "profile-and-plan.md").read_text()


def run(name: str, *arguments: str, cache: Path | None = None) -> str:
    environment = {**os.environ, **({"E2LORA_CACHE": str(cache)} if cache else {})}
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_docs_hold_the_table_of_published_counts() -> None:
    assert run("published_counts").strip() in DOCS


@pytest.mark.slow
def test_profile_cost_compares_all_ways_on_any_llama(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tied=True).name
    out = run("profile_cost", "--model", model, "--rows", "4", "--tokens", "8", "--rounds", "1")
    ways = [line.split("  ")[0] for line in out.splitlines()]
    for way in ("plain", "autograd", "probe", "probe, 4 folds"):
        assert way in ways
    (error,) = re.findall(r"probe to autograd: (\S+)", out)
    assert float(error) < 1e-5


@pytest.mark.slow
def test_calibration_size_compares_disjoint_samples(tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i} + 1", "answer": "{i + 1}"}}\n' for i in range(40)))
    model = tiny_llama(tmp_path / "model", tied=True).name
    task = ["--task", "sft", f"data={rows}", "validation_size=4"]
    out = run(
        "calibration_size",
        *("--model", model, *task, "--targets", "q_proj", "v_proj", "--sizes", "2", "4"),
        cache=tmp_path / "cache",
    )
    table = out[out.index("rows") :].splitlines()
    assert [line.split()[0] for line in table[-2:]] == ["2", "4"]


def difference_of_losses(out: str) -> float:
    (apart,) = re.findall(r"difference of a step's loss between e2lora and bare loop: (\S+)", out)
    return float(apart)


@pytest.mark.slow
def test_train_throughput_compares_all_sides_on_a_classifier() -> None:
    steps = ("--rounds", "2", "--steps", "1", "--warmup", "1", "--threads", "1")
    out = run("train_throughput", "encoder", *steps)
    sides = [re.split(r"\s{2,}", line)[0] for line in out.splitlines()[2:8]]
    assert sides == [
        "e2lora",
        "Trainer",
        "Trainer, grouped",
        "Trainer, ZeRO-1",
        "bare loop",
        "bare, random order",
    ]
    assert difference_of_losses(out) < 1e-5
    assert "e2lora to Trainer: " in out


@pytest.mark.slow
def test_train_throughput_compares_sides_on_a_causal_model(tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    lines = (f'{{"question": "{i} + 1", "answer": "{i + 1}"}}\n' for i in range(200))
    rows.write_text("".join(lines))
    model = tiny_llama(tmp_path / "model", tied=True).name
    out = run(
        "train_throughput",
        *("decoder", "--model", model, "--data", str(rows)),
        *("--sides", "Trainer", "bare loop"),
        *("--rounds", "1", "--steps", "2", "--warmup", "1", "--threads", "1"),
    )
    assert difference_of_losses(out) < 1e-5


@pytest.mark.slow
def test_trial_overhead_compares_a_resident_group_with_a_trainer_per_trial() -> None:
    out = run("trial_overhead", "--trials", "2", "--own", "1", "--steps", "1")
    (ours,) = re.findall(r"overhead of a trial on a resident group: (\S+) s", out)
    (times,) = re.findall(r"TorchTrainer per trial: (\S+) times as much", out)
    assert float(ours) < 5
    assert float(times) > 2
