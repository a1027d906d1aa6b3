"""What the README shows is so: its Python runs, its tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import e2lora.config
from e2lora.adapters import FAMILIES
from e2lora.config import AdapterConfig, PlanConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ADAPTERS = (ROOT / "docs" / "adapters.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_example_runs(block: str) -> None:
    names: dict[str, Any] = {**vars(e2lora.config), "__name__": "example"}
    exec(compile(block, "README.md", "exec"), names)
    if "model" in names:
        trainable, _ = names["model"].get_nb_trainable_parameters()
        assert 0 < trainable < 100_000


def test_adapters_page_says_what_each_family_allows() -> None:
    """And its Python runs."""
    for block in re.findall(r"```python\n(.*?)```", ADAPTERS, re.DOTALL):
        if "trial.suggest" not in block:
            exec(compile(block, "adapters.md", "exec"), {"__name__": "example"})
    yes_no = {True: "yes", False: "no"}
    for key, family in FAMILIES.items():
        names = () if key == "full" else ("query",)
        adapter = AdapterConfig(family=key, target_modules=names)  # type: ignore[arg-type]
        try:
            family.require_suits(PlanConfig(allocation="entropy_power"), adapter)
            allocates = True
        except ValueError:
            allocates = False
        cells = [
            f"`{key}`",
            *(yes_no[ability not in family.lacks] for ability in ("merge", "peft", "portable")),
            f"0–{max(family.zero_stages)}",
            yes_no[allocates],
            ", ".join(family.scopes),
        ]
        assert f"| {' | '.join(cells)} |" in ADAPTERS


def test_tree_names_every_file_and_no_other() -> None:
    tree = README.split("## How it works")[1].split("\n## ")[0]
    missing = [
        str(path)
        for folder in ("e2lora", "search_spaces", "jobs")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if (path := file.relative_to(ROOT)).name != "__init__.py"
        and not re.search(rf"(?<!\w)({re.escape(str(path))}|{_short(path)})(?!\w)", tree)
    ]
    assert not missing
    for name in re.findall(r"^ +([\w/]+\.py) ", tree, re.MULTILINE):
        assert (ROOT / name).exists() or (ROOT / "e2lora" / name).exists(), name


def _short(path: Path) -> str:
    """As the tree names it below ``e2lora/``."""
    return re.escape(str(path.relative_to("e2lora"))) if path.parts[0] == "e2lora" else "nothing"
