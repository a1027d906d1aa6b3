"""Rooms import only rooms above them, and each large dependency has its own room."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PURE = (
    "config.frozen",
    "config.adapter",
    "config.tasks",
    "config.presets.preset",
    "config.presets.glue",
    "config.presets.images",
    "config.presets.maths",
    "config.presets.choices",
    "config.presets.code",
    "config.presets",
    "config.plan",
    "config.systems",
    "config.deepspeed",
    "config.training",
    "config",
    "moments",
    "partition",
    "ranks",
    "stability",
    "sharing",
    "plan",
    "crossed",
    "statistics",
    "pseudo",
    "patience",
    "records",
)

# From the top down; a room imports only rooms on lines above its own. A pattern takes every module
# that no other line names: entries of a registry, which need no line of their own. The rooms of one
# line don't import each other.
ROOMS = (
    *PURE,
    "memory",
    "masking",
    "hub",
    "assets",
    "command",
    "partitioned",
    "gathering",
    "quantized",
    "device",
    "attention",
    "weights",
    "models",
    "targets",
    "gradients.sums",
    "gradients.probe",
    "gradients.idle",
    "gradients.recorder",
    "gradients.whole",
    "gradients",
    "tasks.remote",
    "tasks.sources",
    "tasks.rows",
    "tasks.duplicates",
    "tasks.scores",
    "tasks.columns",
    "tasks.packing",
    "tasks.task",
    "tasks.metrics",
    "tasks.labels",
    "tasks.images",
    "tasks.texts",
    "tasks.prompts",
    "tasks.prompted",
    "tasks.equations",
    "tasks.answers",
    "tasks.choices",
    "tasks.sandboxed",
    "tasks.sandbox",
    "tasks.pass_at_k",
    "tasks.problems",
    "tasks.*",
    "tasks",
    "adapters.family",
    "adapters.tensors",
    "adapters.starting",
    "adapters.lora",
    "adapters.adalora",
    "adapters.*",
    "adapters",
    "adapters.record",
    "adapters.storage",
    "adapters.comparison",
    "adapters.portable",
    "adapters.export",
    "tokens",
    "prefetch",
    "data",
    "profile_cache",
    "profile",
    "planning.estimate",
    "generation",
    "evaluate",
    "training.stopping",
    "training.checkpoint",
    "training.activations",
    "training.states",
    "training.compiling",
    "training.health",
    "training.microbatch",
    "training.outset",
    "training.engine",
    "training.meter",
    "training",
    "broker",
    "broker_actor",
    "fleet",
    "tracking.contents",
    "tracking.store",
    "tracking.views",
    "tracking",
    "tracking.predictor",
    "tracking.served",
    "tracking.registry",
    "scored",
    "comparisons",
    "wording",
    "verdict",
    "figures",
    "front",
    "text_table",
    "tables",
    "standings",
    "ablation",
    "sensitivity",
    "published",
    "reproduction",
    "importance",
    "curves",
    "sections",
    "winner",
    "gallery",
    "planning.tables",
    "report",
    "resident",
    "worker",
    "cluster",
    "checkup.node",
    "checkup.findings",
    "checkup",
    "recording",
    "utilisation",
    "pool",
    "preflight",
    "planning",
    "search",
    "search.samplers",
    "search.plans",
    "search.points",
    "search.pruning",
    "search.unchanged",
    "search.trials",
    "search.progress",
    "search.journal",
    "search.ledger",
    "search.seeds",
    "search.estimate",
    "search.cost",
    "search.study",
    "search.entry",
    "checkup.entry",
    "single.choice",
    "single.progress",
    "single",
    "single.entry",
    "planning.entry",
)

# Package → the only rooms that know it.
OWNERS = {
    "mlflow": ("tracking.*",),
    "deepspeed": ("device", "gathering", "partitioned", "training.engine", "training.states"),
    "peft": ("adapters.*",),
    "datasets": ("tasks.images", "tasks.sources"),
    "matplotlib": ("figures", "front"),
    "sklearn": ("tasks.metrics",),
    "optuna": ("search.*",),
    "ray": ("cluster", "pool", "worker", "search.*"),
    "ray.tune": ("search.*",),
    "ray.train": ("pool",),
}

PURE_PACKAGES = {"numpy", "scipy", "pydantic"}


def module_of(file: Path) -> str:
    """``e2lora/tasks/rows.py`` → ``tasks.rows``; the package itself is ``""``."""
    parts = file.relative_to(ROOT / "e2lora").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sorted((ROOT / "e2lora").rglob("*.py"))}
SPACES = sorted((ROOT / "search_spaces").glob("*.py"))


def imports_of(source: str) -> Iterator[str]:
    """Every dotted name that is imported anywhere in a file, inside functions too.

    ``from a import b`` gives ``a`` and ``a.b``: b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"write imports in full: {ast.unparse(node)}"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def rooms_imported(source: str) -> set[str]:
    """Modules of the package that a file imports; ``e2lora`` itself holds nothing."""
    names = {name for name in imports_of(source) if name.startswith("e2lora.")}
    return {name.removeprefix("e2lora.") for name in names} & set(MODULES)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(module: str) -> int:
    """The line of a module in ``ROOMS``: its own, or else the pattern's."""
    if module in ROOMS:
        return ROOMS.index(module)
    return next(i for i, room in enumerate(ROOMS) if fnmatchcase(module, room))


def test_every_module_has_a_room_and_every_room_is_there() -> None:
    placed = {m for m in MODULES if any(fnmatchcase(m, room) for room in ROOMS)}
    assert set(MODULES) - placed == {""}, "place new files in ROOMS"
    gone = {r for r in ROOMS if not any(fnmatchcase(m, r) for m in MODULES)}
    assert not gone, "take removed files out of ROOMS"


def test_walker_sees_imports_wherever_they_stand() -> None:
    source = """
import os.path as p
def f():
    if True:
        from e2lora import training
        from e2lora.tasks.rows import READERS
    class C:
        import e2lora.plan
importlib.import_module("ray.tune")
"""
    assert {"os.path", "ray.tune", "e2lora.tasks.rows.READERS"} <= set(imports_of(source))
    assert rooms_imported(source) == {"training", "tasks.rows", "plan"}


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_room_imports_only_rooms_above_it(module: str) -> None:
    below = {
        other
        for other in rooms_imported(MODULES[module].read_text())
        if room_of(other) >= room_of(module)
    }
    assert not below, f"e2lora.{module} may not import {sorted(below)}"


def test_package_itself_imports_nothing_until_it_is_asked() -> None:
    """Its names are looked up by a table; every entry of which leads somewhere."""
    assert {name.partition(".")[0] for name in imports_of(MODULES[""].read_text())} <= {"importlib"}
    code = """
import sys, e2lora
assert not [name for name in sys.modules if name.startswith("e2lora.")]
for name in e2lora._PLACES:
    assert getattr(e2lora, name).__name__ in e2lora._PLACES[name], name
    assert name in dir(e2lora)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", PURE)
def test_pure_room_needs_only_numpy_scipy_and_pydantic(module: str) -> None:
    packages = {name.partition(".")[0] for name in imports_of(MODULES[module].read_text())}
    foreign = packages - set(sys.stdlib_module_names) - PURE_PACKAGES - {"e2lora"}
    assert not foreign


@pytest.mark.parametrize("package", OWNERS)
def test_package_is_known_only_to_its_rooms(package: str) -> None:
    users = {
        module
        for module, file in MODULES.items()
        if any(within(name, package) for name in imports_of(file.read_text()))
    }
    assert users, f"nothing imports {package} any more: take it out of OWNERS"
    strangers = {m for m in users if not any(fnmatchcase(m, owner) for owner in OWNERS[package])}
    assert not strangers


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_search_space_needs_only_the_configuration(file: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"search_spaces"}
    for name in imports_of(file.read_text()):
        assert name.partition(".")[0] in allowed or within(name, "e2lora.config"), name


def test_plans_broker_and_report_are_made_without_torch_or_ray() -> None:
    light = ("e2lora", *(f"e2lora.{m}" for m in (*PURE, "broker", "report", "search")))
    heavy = ("torch", "transformers", "ray", "optuna", "mlflow", "datasets")
    code = f"""
import importlib, sys
for name in {light}:
    importlib.import_module(name)
    found = [heavy for heavy in {heavy} if heavy in sys.modules]
    assert not found, f"{{name}} imports {{found}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
