"""What a submitted job brings to its cluster, and what an image of the project holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
SOURCES = {"e2lora", "jobs", "search_spaces"}
OWN = {"my_study.py", "data/train.jsonl", "plans/mine.json"}
LEFT = {
    *(".git/config", ".venv/bin/python", "venv/x", "e2lora/__pycache__/x.pyc", "build/x", "dist/x"),
    *("results/s/x", "outputs/x", "mlruns/0", "mlartifacts/0", "mlflow.db", "mlflow.db-journal"),
    *("data/mlflow.db", ".env", "data/.env.local", ".netrc", "cloud.pem", "data/ssh.key"),
    *("auth_token", ".ray/auth_token", "tests/x.py", "docs/x.md", "benchmarks/x.py", ".ci/run"),
    *("deploy/gcp.yaml", "cluster.yaml", "Dockerfile", "Makefile", ".dockerignore"),
    *(".mypy_cache/x", ".pytest_cache/x", ".ruff_cache/x", ".hypothesis/x", "e2lora.egg-info/x"),
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project's files, a user's own beside them, and much that must stay."""
    root = tmp_path / "checkout"
    for folder in SOURCES:
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for file in (*SHIPPED, ".rayignore", ".gitignore"):
        shutil.copy(ROOT / file, root / file)
    for file in OWN | LEFT:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("planted")
    return root


def expected(root: Path) -> set[str]:
    sources = {
        str(path.relative_to(root))
        for folder in SOURCES
        for path in (root / folder).rglob("*")
        if path.is_file()
    }
    return sources - LEFT | SHIPPED | OWN


def package(root: Path, to: Path, include_gitignore: bool) -> set[str]:
    """As `ray job submit --working-dir` makes it."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    create_package(
        str(root),
        to,
        include_gitignore=include_gitignore,
        excludes=get_runtime_env_default_excludes(),
    )
    with zipfile.ZipFile(to) as file:
        return {name for name in file.namelist() if not name.endswith("/")}


@pytest.mark.parametrize("include_gitignore", [True, False])
def test_job_ships_what_it_needs_and_nothing_else(
    checkout: Path, tmp_path: Path, include_gitignore: bool
) -> None:
    file = tmp_path / "package.zip"
    assert package(checkout, file, include_gitignore) == expected(checkout)
    assert file.stat().st_size < 4e6


def test_new_results_make_no_new_package(checkout: Path) -> None:
    from ray._private.runtime_env.packaging import get_uri_for_directory

    before = get_uri_for_directory(str(checkout), include_gitignore=True)
    (checkout / "results/s/y").write_text("more")
    (checkout / "mlflow.db").write_text("changed")
    assert get_uri_for_directory(str(checkout), include_gitignore=True) == before
    (checkout / "my_study.py").write_text("changed")
    assert get_uri_for_directory(str(checkout), include_gitignore=True) != before


def test_image_holds_what_a_job_ships(checkout: Path) -> None:
    from ray._private.thirdparty.pathspec import PathSpec

    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    # Docker's patterns hold at the root, git's anywhere
    ignored = PathSpec.from_lines(
        "gitwildmatch",
        [p.removeprefix("**/") if p.startswith("**/") else f"/{p}" for p in patterns],
    )
    files = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    assert {file for file in files if not ignored.match_file(file)} == expected(checkout)


def instructions(name: str) -> list[str]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return re.findall(rf"^{name} (.*)$", text.replace("\\\n", " "), re.MULTILINE)


def test_bare_command_works_in_the_image() -> None:
    (base,), (place,) = instructions("FROM"), instructions("WORKDIR")
    assert base == "python:3.11-slim"
    assert f"PYTHONPATH={place}" in instructions("ENV")[0].split()
    assert instructions("COPY")[-1].split()[-2:] == [".", "."]
    for copied in instructions("COPY"):
        sources = [word for word in copied.split()[:-1] if not word.startswith("--")]
        assert all((ROOT / source).exists() for source in sources)
    command = json.loads(instructions("CMD")[0])
    assert command[0] == "python"
    assert (ROOT / command[1]).exists()
    assert int(instructions("USER")[-1]) > 0
    assert f"--uid {instructions('USER')[-1]} " in " ".join(instructions("RUN"))
    assert not [run for run in instructions("RUN") if re.search(r"\d==|==\d|>=", run)]


def test_image_installs_the_packages_of_pyproject_in_the_versions_of_constraints(
    tmp_path: Path,
) -> None:
    """The build's own line, with a pip that only notes what it was asked."""
    (line,) = (run for run in instructions("RUN") if "pip install" in run)
    (tmp_path / "bin").mkdir()
    pip = tmp_path / "bin" / "pip"
    pip.write_text('#!/bin/sh\necho "$@" >> asked\nfor last; do :; done\ncat "$last" || true\n')
    pip.chmod(0o755)
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).symlink_to(sys.executable)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shown = subprocess.run(
        ["/bin/sh", "-ec", line.replace("/tmp/", f"{tmp_path}/")],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "TORCH_INDEX": "https://index"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["qlora"]
    assert shown.splitlines() == wanted
    first, second = (tmp_path / "asked").read_text().splitlines()
    assert first == "install --no-deps --constraint constraints.txt --index-url https://index torch"
    assert second.startswith("install --constraint constraints.txt --requirement ")
