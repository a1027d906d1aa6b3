"""Prompts with the answers that a causal model is to give: what all tasks over such rows share.

A row is a prompt, put as :mod:`e2lora.tasks.prompts` says, and behind it an answer, on whose tokens
alone there is a loss. Metrics, all better when lower: ``nll``, the mean over rows of each answer's
mean token NLL, so the mean of the outcomes that paired tests compare; ``loss``, the mean over all
answer tokens, as in training; and ``perplexity``, exp(loss).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e2lora.config import PromptsConfig
from e2lora.tasks.columns import padded
from e2lora.tasks.packing import packed
from e2lora.tasks.prompts import Prompter
from e2lora.tasks.rows import content_of, source_name
from e2lora.tasks.scores import RowScore, mean_loss, mean_outcomes
from e2lora.tasks.task import Direction, Task

IGNORED = -100  # the label of a token without a loss, in torch and transformers
ROW_NUMBER = "__row__"  # the row's number in its file, kept through carving for messages
MAX_EXPONENT = 700.0  # a record holds finite numbers only


class Prompted(Task):
    """See :class:`e2lora.tasks.Task`. A task of its own sets ``_rows``, ``splits``, ``duplicates``.

    ``_rows``: of each split a ``datasets.Dataset`` with the column ``ROW_NUMBER``.
    """

    config: PromptsConfig
    num_labels: int | None = None  # a language model has no label head
    can_pack = True
    directions: Mapping[str, Direction | None] = {
        "nll": "minimize",
        "loss": "minimize",
        "perplexity": "minimize",
    }
    _rows: Mapping[str, Any]

    def __init__(self, config: PromptsConfig) -> None:
        from transformers import AutoModelForCausalLM

        self.auto_class = AutoModelForCausalLM
        self.config = config

    @abstractmethod
    def questions(self, split: str) -> list[str]:
        """What stands in the prompt's place, of every row."""

    @abstractmethod
    def answers(self, split: str) -> list[str]:
        """What is to follow, of every row."""

    @cached_property
    def prompter(self) -> Prompter:
        return Prompter.of(self.config, self.questions("train"), self.answers("train"))

    def num_rows(self, split: str) -> int:
        return len(self._rows[split])

    def content(self, split: str) -> str:
        columns = [self.questions(split), self.answers(split)]
        shown = [list(example) for example in self.prompter.examples]
        return content_of(self.config, [*columns, shown])

    def features(self, split: str, tokenizer: Any) -> list[dict[str, Any]]:
        """``input_ids``: the prompt, begun as the tokenizer begins a text, the answer and its end.

        ``labels`` are the ids of answer and end, and ``IGNORED`` on all that stands before. An
        answer that is cut at ``max_length`` loses its end: the model shall not learn to end there.

        Raises:
            ValueError: the tokenizer has no eos; a prompt without tokens, or that fills max_length.
        """
        questions, answers = self.questions(split), self.answers(split)
        closed = self.prompter.answer_ids(tokenizer, questions, answers)
        features = []
        for row, prompt in enumerate(self.prompter.prompt_ids(tokenizer, questions)):
            self._require_room(split, row, questions[row], len(prompt))
            labels = [IGNORED] * len(prompt) + closed[row]
            input_ids = [*prompt, *closed[row]]
            size = self.config.max_length
            features.append({"input_ids": input_ids[:size], "labels": labels[:size]})
        return features

    def prompts(self, split: str, tokenizer: Any) -> list[list[int]]:
        return self.prompter.prompt_ids(tokenizer, self.questions(split))

    def _require_room(self, split: str, row: int, prompt: str, num_tokens: int) -> None:
        if 0 < num_tokens < self.config.max_length:
            return
        number = self._rows[split][ROW_NUMBER][row]
        where = f"{split} row {number} of {source_name(self.config, split)!r}"
        if num_tokens == 0:
            raise ValueError(
                "an answer's first token is predicted from what stands before it, so every prompt "
                f"needs a token; {where} has none: {prompt!r} in template "
                f"{self.config.template!r}. Correct or drop the row, or add words to `template`."
            )
        start = prompt if len(prompt) <= 80 else f"{prompt[:80]}…"
        shots = f" with {self.config.num_shots} examples" if self.config.num_shots else ""
        raise ValueError(
            f"a prompt must leave room for its answer within `max_length`; {where} has "
            f"{num_tokens} prompt tokens{shots}, max_length is {self.config.max_length}: "
            f"{start!r}. Raise `max_length` or drop the row."
        )

    # ---- batches ------------------------------------------------------------------------------

    def collate(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Padded on the right, whatever side the tokenizer prefers for generation."""
        input_ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": padded(input_ids, pad_id(tokenizer)),
            "attention_mask": padded([np.ones(len(ids), int) for ids in input_ids], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }

    def pack(
        self, rows: Sequence[dict[str, Any]], tokenizer: Any, one_sequence: bool = False
    ) -> dict[str, Tensor]:
        input_ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
        return packed(input_ids, labels, pad_id(tokenizer), IGNORED, one_sequence)

    def num_supervised(self, rows: Sequence[dict[str, Any]]) -> int:
        """Tokens of the answers, each end included; a prompt's token stands before each of them."""
        return sum(int((np.asarray(row["labels"]) != IGNORED).sum()) for row in rows)

    def loss_sum(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return token_losses(model, batch)[0].sum()

    # ---- scores -------------------------------------------------------------------------------

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        losses, supervised = token_losses(model, batch)
        counts = supervised.sum(1).tolist()
        sums = [part.double().sum().item() for part in losses.split(counts)]
        return [
            RowScore({"nll": total / n}, total, n) for total, n in zip(sums, counts, strict=True)
        ]

    def metrics(self, scores: Sequence[RowScore]) -> dict[str, float]:
        """Of what only some rows have, over these."""
        loss = mean_loss(scores)
        perplexity = math.exp(min(loss, MAX_EXPONENT))
        return {**mean_outcomes(scores), "loss": loss, "perplexity": perplexity}


def token_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses of the n supervised tokens, [n], row after row, and where they are, [b, s - 1].

    The logits at token t predict token t + 1.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    following = batch["labels"][:, 1:]
    supervised = following != IGNORED
    # Chosen before they are widened: [n, vocabulary] in float32, not [b, s, vocabulary].
    chosen = logits[supervised].float()
    losses = torch.nn.functional.cross_entropy(chosen, following[supervised], reduction="none")
    return losses, supervised


def with_context(prompt: str, context: str) -> str:
    """What stands in the prompt's place, with a row's further text behind it.

    >>> with_context("Add up:", "2 3")
    'Add up:\\n\\n2 3'
    """
    return f"{prompt}\n\n{context}" if context.strip() else prompt


def numbered(rows: Any) -> Any:
    """Rows with their numbers in the file."""
    return rows.add_column(ROW_NUMBER, list(range(len(rows))))


def pad_id(tokenizer: Any) -> int:
    """Any token does: no row sees its padding."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad
