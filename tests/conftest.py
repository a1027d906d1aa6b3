"""What several tests share: small trials on the demo's own model and data, and honest skipping."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, outside of Ray Train
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores cost tenfold

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = str(ROOT)  # processes that tests start find e2lora, and tests
LACKING: list[str] = []


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as a group of one worker: once only, since DeepSpeed keeps the group it met."""
    import torch

    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def data_folder(name: str) -> str:
    """A data set of ``E2LORA_DATA`` (default: beside the checkout); skips, counted, if absent."""
    root = Path(os.environ.get("E2LORA_DATA", ROOT.parent / "shared" / "data"))
    return _found(root / name)


def model_folder(name: str) -> str:
    """A model of ``E2LORA_MODELS`` (default: the user's cache); skips, counted, if absent."""
    beside, cache = ROOT.parent / "shared" / "models", Path.home() / ".cache" / "e2lora-models"
    default = beside if (beside / name).exists() else cache
    return _found(Path(os.environ.get("E2LORA_MODELS", default)) / name)


def needs_package(name: str, extra: str) -> None:
    """A package of one of the project's extras; skips, counted, if absent."""
    if importlib.util.find_spec(name) is None:
        LACKING.append(f"{name}, of e2lora[{extra}]")
        pytest.skip(f"{name} isn't installed: pip install 'e2lora[{extra}]'")


def needs_root(what: str, error: object) -> NoReturn:
    """Something of the machine's that only root may make; skips, counted."""
    LACKING.append(f"{what}, by root")
    pytest.skip(f"{what} can only be made by root: {error}")


def _found(path: Path) -> str:
    if not path.exists():
        LACKING.append(str(path))
        pytest.skip(f"{path} isn't there")
    return str(path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    line = f"{len(LACKING)} test(s) skipped for lack of further data, models or packages"
    if LACKING:
        names = ", ".join(sorted({Path(path).name for path in LACKING}))
        line += f" ({names}): set E2LORA_DATA and E2LORA_MODELS to the folders that hold them"
    terminalreporter.write_line(f"{line}.")
