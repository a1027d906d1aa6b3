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
