"""An adapter that answers new inputs, with no data at hand; knows nothing of MLflow.

Inputs are columns of texts, under the names that the task's data has:

    text_classification   the text, or both texts → ``label``, and ``logits`` in order of the labels
    regression            the text, or both texts → ``value``
    sft                   the prompt, and its context if there is one → ``answer``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from e2lora.adapters.record import AdapterRecord
from e2lora.adapters.storage import RECORD, load_adapter
from e2lora.config import AnyTaskConfig, Frozen, SftConfig, TextsConfig
from e2lora.generation import write
from e2lora.models import CPU, load_base
from e2lora.tasks import load_task
from e2lora.tasks.prompted import with_context
from e2lora.tasks.prompts import Prompter
from e2lora.tasks.regression import Regression
from e2lora.tasks.sft import Sft
from e2lora.tasks.text_classification import TextClassification
from e2lora.training.engine import adapter_buffers

ColumnType = Literal["string", "long", "double", "doubles"]
ANSWERED = ("text_classification", "regression", "sft")
BATCH_SIZE = 32


def require_answered(task: AnyTaskConfig) -> None:
    """
    Raises:
        ValueError: a kind of task whose inputs aren't answered here.
    """
    if task.kind not in ANSWERED:
        raise ValueError(
            f"a registered model takes texts, so its task is one of {', '.join(ANSWERED)}; got "
            f"{task.kind!r}. Leave out --register, and load the trial's adapter folder in Python "
            "(e2lora.load), or export it by jobs/export.py."
        )


class AnsweringRecord(Frozen):
    """What a task's rows decided of how inputs are put, and answers told.

    Attributes:
        labels: of a classification, in order of the logits.
        examples: worked ones, where prompts have some before them.
    """

    task: AnyTaskConfig
    labels: tuple[int | str, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, config: AnyTaskConfig) -> AnsweringRecord:
        """Reads the task's data.

        Raises:
            ValueError: a kind of task whose inputs aren't answered here, or what reading raises.
        """
        require_answered(config)
        task = load_task(config)
        if isinstance(task, TextClassification):
            return cls(task=config, labels=tuple(task.labels))
        if isinstance(task, Sft):
            return cls(task=config, examples=task.prompter.examples)
        assert isinstance(task, Regression)
        return cls(task=config)

    @property
    def inputs(self) -> list[str]:
        """Columns of texts."""
        task = self.task
        if isinstance(task, SftConfig):
            return [task.prompt_column, *([task.context_column] if task.context_column else [])]
        assert isinstance(task, TextsConfig)
        return [task.text_column, *([task.text2_column] if task.text2_column else [])]

    @property
    def outputs(self) -> dict[str, ColumnType]:
        """Column → type."""
        if self.task.kind == "sft":
            return {"answer": "string"}
        if self.task.kind == "regression":
            return {"value": "double"}
        words = isinstance(self.labels[0], str)
        return {"label": "string" if words else "long", "logits": "doubles"}


class Predictor:
    """A base model with its adapter, loaded to answer.

    Args:
        adapter: a trial's ``adapter`` folder.

    Raises:
        FileNotFoundError, OSError, ValueError: no adapter, or not the base that it belongs to.
    """

    def __init__(self, adapter: Path, record: AnsweringRecord, device: torch.device = CPU) -> None:
        import transformers

        stored = AdapterRecord.model_validate_json((adapter / RECORD).read_text(encoding="utf-8"))
        base = stored.base
        assert base.model is not None, "a trial's adapter names its base"
        kind = "CausalLM" if isinstance(record.task, SftConfig) else "SequenceClassification"
        auto_class = getattr(transformers, f"AutoModelFor{kind}")
        dtype = getattr(torch, base.dtype)
        loaded = load_base(base.model, auto_class, base.num_labels, dtype, device)
        self._record, self._processor, self._device = record, loaded.processor, device
        self._model = load_adapter(loaded.model, adapter).eval()
        _settle(self._model, dtype, device)

    def predict(self, inputs: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Answers in row order, by the names of ``record.outputs``."""
        columns = [list(inputs[name]) for name in self._record.inputs]
        answered: dict[str, list[Any]] = {name: [] for name in self._record.outputs}
        for start in range(0, len(columns[0]), BATCH_SIZE):
            batch = [column[start : start + BATCH_SIZE] for column in columns]
            for name, values in self._batch(batch, start).items():
                answered[name] += values
        return answered

    def _batch(self, columns: list[list[str]], start: int) -> dict[str, list[Any]]:
        if isinstance(self._record.task, SftConfig):
            return {"answer": self._answers(self._record.task, columns, start)}
        logits = self._logits(columns)
        if self._record.task.kind == "regression":
            return {"value": logits.squeeze(-1).tolist()}
        labels = [self._record.labels[place] for place in logits.argmax(-1).tolist()]
        return {"label": labels, "logits": logits.tolist()}

    def _logits(self, columns: list[list[str]]) -> Tensor:
        """float32, [rows, labels]; texts are put as the task's features are."""
        assert isinstance(self._record.task, TextsConfig)
        encoded = self._processor(
            *columns,
            truncation=True,
            max_length=self._record.task.max_length,
            padding=True,
            return_tensors="pt",
        )
        known = self._processor.model_input_names
        batch = {k: v.to(self._device) for k, v in encoded.items() if k in known}
        with torch.no_grad():
            return self._model(**batch).logits.float().cpu()

    def _answers(self, task: SftConfig, columns: list[list[str]], start: int) -> list[str]:
        """The first of the samples, as when the task is scored."""
        asked = columns[0]
        if task.context_column:
            asked = [with_context(*texts) for texts in zip(*columns, strict=True)]
        prompter = Prompter(task, self._record.examples)
        stop = dict.fromkeys((*task.generation.stop, *prompter.stop()))
        generation = task.generation.model_copy(update={"stop": tuple(stop), "num_samples": 1})
        numbers = range(start, start + len(asked))
        prompts = prompter.prompt_ids(self._processor, asked)
        written = write(self._model, self._processor, prompts, generation, numbers)
        return [texts[0] for texts in written]


def _settle(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Where it computes, and its adapter in the type that it was trained in."""
    for parameter in model.parameters():
        data = parameter.data
        parameter.data = data.to(device, dtype if data.is_floating_point() else None)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for buffer in adapter_buffers(model):
        buffer.data = buffer.data.to(dtype)
