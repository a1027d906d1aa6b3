"""A node that uses a hub: it imports the libraries once, and runs each thing asked in a fork."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from e2lora.assets import cache_root


class Answer:
    """What a process of the node says, once it has ended."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def get(self, timeout: float = 60.0) -> dict[str, Any]:
        """``value`` or ``error``, ``kind`` (the error's class) and ``seconds`` that it took."""
        deadline = time.monotonic() + timeout
        while not self.file.exists():
            assert time.monotonic() < deadline, f"no answer within {timeout} s"
            time.sleep(0.01)
        return json.loads(self.file.read_text())


class Node:
    """A machine with a home of its own; ``caches`` is its HF_HOME, and may be emptied between."""

    def __init__(self, folder: Path, hub: str, **environment: str) -> None:
        self.folder, self.caches, self._asked = folder, folder / "hf", 0
        folder.mkdir()
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS", "E2LORA", "LOCAL_RANK"))
        }
        kept |= {"HF_ENDPOINT": hub, "HF_HOME": str(self.caches), "HOME": str(folder)}
        kept |= {"E2LORA_CACHE": str(cache_root())}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_node"],
            stdin=subprocess.PIPE,
            text=True,
            env={**kept, **environment},
        )

    def start(self, do: str, *arguments: Any, env: Mapping[str, str] | None = None) -> Answer:
        self._asked += 1
        answer = self.folder / f"answer-{self._asked}.json"
        line = {"do": do, "arguments": arguments, "env": env or {}, "answer": str(answer)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return Answer(answer)

    def run(self, do: str, *arguments: Any, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self.start(do, *arguments, env=env).get()

    def forget(self) -> None:
        """Empty the caches."""
        shutil.rmtree(self.caches, ignore_errors=True)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def make(folder: str, seed: int) -> None:
    """A BERT of two layers with the demo model's tokenizer."""
    import torch
    from transformers import AutoModel, AutoTokenizer, BertConfig

    from e2lora.assets import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:minilm-l6"))
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=len(tokenizer),
    )
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(name: str, revision: str | None = None, patience: float | None = None) -> dict[str, Any]:
    """As a worker does before its first trial.

    Args:
        patience: with the hub; None: the default.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    import e2lora.hub
    from e2lora.config import ModelConfig
    from e2lora.models import load_base

    e2lora.hub.PATIENCE = patience or e2lora.hub.PATIENCE
    config = ModelConfig(name=name, revision=revision)
    base = load_base(config, AutoModelForSequenceClassification, 2, torch.float32)
    assert base.processor("a film")["input_ids"] == [101, 1037, 2143, 102], "as BERT's words are"
    return {
        "fingerprint": base.fingerprint,
        "name": base.model.name_or_path,
        "commit": getattr(base.model.config, "_commit_hash", None),
    }


def structure(name: str) -> int:
    """As a preflight does, without weights; the number of layers."""
    from transformers import AutoModelForSequenceClassification

    from e2lora.config import ModelConfig
    from e2lora.models import load_processor, load_structure

    config = ModelConfig(name=name)
    load_processor(config, "text")
    model: Any = load_structure(config, AutoModelForSequenceClassification, 2)
    return model.config.num_hidden_layers


def rows(name: str) -> int:
    """How many training rows a data set leaves beside four for validation."""
    from e2lora.config import TextClassificationConfig
    from e2lora.tasks import load_task

    return load_task(TextClassificationConfig(data=name, validation_size=4)).num_rows("train")


def check(model: str, data: str, stage: bool) -> list[str]:
    """As ``jobs/doctor.py`` asks each node; what is wrong."""
    from e2lora.checkup.node import unreadable_here
    from e2lora.config import ModelConfig, TextClassificationConfig
    from tests.small import small_trial

    pair = {
        "model": ModelConfig(name=model),
        "task": TextClassificationConfig(data=data, validation_size=4),
    }
    return unreadable_here([small_trial().model_copy(update=pair).model_dump_json()], stage)


DOES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (make, load, structure, rows, check)}


def _answer(line: dict[str, Any]) -> None:
    os.environ.update(line["env"])
    if "HF_HUB_OFFLINE" in line["env"]:  # was read before the fork
        import datasets
        import huggingface_hub

        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    started = time.monotonic()
    try:
        said: dict[str, Any] = {"value": DOES[line["do"]](*line["arguments"])}
    except Exception as error:
        said = {"error": str(error), "kind": type(error).__name__}
        said["traceback"] = "".join(traceback.format_exception(error))
    file = Path(line["answer"])
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**said, "seconds": time.monotonic() - started}))
    partial.rename(file)


def main() -> None:
    import datasets  # noqa: F401
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401
    from transformers.models.bert import modeling_bert  # noqa: F401

    import e2lora.checkup.node
    import e2lora.models
    import e2lora.tasks  # noqa: F401

    for line in sys.stdin:
        if os.fork() == 0:
            _answer(json.loads(line))
            os._exit(0)


if __name__ == "__main__":
    main()
