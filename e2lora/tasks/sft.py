"""Supervised fine-tuning of a causal model: a prompt, and the answer whose tokens it is to give.

Metrics, all better when lower: ``nll``, the mean over rows of each answer's mean token NLL, so the
mean of the outcomes that paired tests compare; ``loss``, the mean over all answer tokens, as in
training; and ``perplexity``, exp(loss).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e2lora.config import SftConfig
from e2lora.tasks.columns import padded
from e2lora.tasks.duplicates import duplicates_of
from e2lora.tasks.packing import packed
from e2lora.tasks.rows import carve_validation, content_of, read_splits, require_filled
from e2lora.tasks.scores import RowScore, mean_loss, mean_outcomes
from e2lora.tasks.task import Direction, Task

IGNORED = -100  # the label of a token without a loss, in torch and transformers
ROW_NUMBER = "__row__"  # the row's number in its file, kept through carving for messages
MAX_EXPONENT = 700.0  # a record holds finite numbers only


class Sft(Task):
    """See :class:`e2lora.tasks.Task`. Rows are checked when read, their lengths in ``features``."""

    directions: Mapping[str, Direction | None] = {
        "nll": "minimize",
        "loss": "minimize",
        "perplexity": "minimize",
    }
    num_labels: int | None = None  # a language model has no label head
    can_pack = True

    def __init__(self, config: SftConfig) -> None:
        from transformers import AutoModelForCausalLM

        self.auto_class = AutoModelForCausalLM
        self.config = config
        columns = [config.prompt_column, config.answer_column]
        splits = read_splits(config, columns)
        for split, rows in splits.items():
            if rows is not None:
                require_filled(rows, columns, str, split, config)
                if not any(answer.strip() for answer in rows[config.answer_column]):
                    raise ValueError(
                        f"an answer must be there to be learnt; every {split} row of "
                        f"{config.data!r} has an empty {config.answer_column!r}. Name the right "
                        f"`answer_column`. First row: {rows[0]}"
                    )
                numbers = list(range(len(rows)))
                splits[split] = rows.select_columns(columns).add_column(ROW_NUMBER, numbers)
        self._rows = carve_validation(splits, config)
        self.duplicates = duplicates_of(self._rows, [config.prompt_column])
        self.splits = tuple(self._rows)

    def num_rows(self, split: str) -> int:
        return len(self._rows[split])

    def content(self, split: str) -> str:
        return content_of(self.config, [self._prompts(split), self._answers(split)])

    def features(self, split: str, tokenizer: Any) -> list[dict[str, Any]]:
        """``input_ids``: special tokens as the tokenizer begins a text, prompt, answer, eos.

        ``labels`` are the ids of answer and eos, and ``IGNORED`` on all that stands before. An
        answer that is cut at ``max_length`` loses its eos: the model shall not learn to end there.

        Raises:
            ValueError: the tokenizer has no eos; a prompt without tokens, or that fills max_length.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "sft ends every answer with the tokenizer's eos token, as causal models are "
                f"trained with; {tokenizer.name_or_path!r} has none. Name a causal model, or set "
                "`eos_token` in its tokenizer_config.json."
            )
        # The template may hold other braces too, which str.format would take for its own.
        texts = [self.config.template.replace("{prompt}", p) for p in self._prompts(split)]
        before = tokenizer(texts, return_special_tokens_mask=True)
        answers = tokenizer(self._answers(split), add_special_tokens=False)
        features = []
        for row, answer in enumerate(answers["input_ids"]):
            prompt = _without_closing(before["input_ids"][row], before["special_tokens_mask"][row])
            self._require_room(split, row, len(prompt))
            labels = [IGNORED] * len(prompt) + [*answer, tokenizer.eos_token_id]
            input_ids = [*prompt, *labels[len(prompt) :]]
            size = self.config.max_length
            features.append({"input_ids": input_ids[:size], "labels": labels[:size]})
        return features

    def _prompts(self, split: str) -> list[str]:
        return self._rows[split][self.config.prompt_column][:]

    def _answers(self, split: str) -> list[str]:
        return self._rows[split][self.config.answer_column][:]

    def _require_room(self, split: str, row: int, num_prompt_tokens: int) -> None:
        if 0 < num_prompt_tokens < self.config.max_length:
            return
        prompt, number = self._prompts(split)[row], self._rows[split][ROW_NUMBER][row]
        where = f"{split} row {number} of {self.config.data!r}"
        if num_prompt_tokens == 0:
            raise ValueError(
                "an answer's first token is predicted from what stands before it, so every prompt "
                f"needs a token; {where} has none: {prompt!r} in template "
                f"{self.config.template!r}. Correct or drop the row, or add words to `template`."
            )
        start = prompt if len(prompt) <= 80 else f"{prompt[:80]}…"
        raise ValueError(
            f"a prompt must leave room for its answer within `max_length`; {where} has "
            f"{num_prompt_tokens} prompt tokens, max_length is {self.config.max_length}: "
            f"{start!r}. Raise `max_length` or drop the row."
        )

    def collate(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Padded on the right, whatever side the tokenizer prefers for generation."""
        input_ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": padded(input_ids, _pad_id(tokenizer)),
            "attention_mask": padded([np.ones(len(ids), int) for ids in input_ids], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }

    def pack(
        self, rows: Sequence[dict[str, Any]], tokenizer: Any, one_sequence: bool = False
    ) -> dict[str, Tensor]:
        input_ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
        return packed(input_ids, labels, _pad_id(tokenizer), IGNORED, one_sequence)

    def num_supervised(self, rows: Sequence[dict[str, Any]]) -> int:
        """Tokens of the answers, each eos included; a prompt's token stands before each of them."""
        return sum(int((np.asarray(row["labels"]) != IGNORED).sum()) for row in rows)

    def loss_sum(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return self._token_losses(model, batch)[0].sum()

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        losses, supervised = self._token_losses(model, batch)
        counts = supervised.sum(1).tolist()
        sums = [part.double().sum().item() for part in losses.split(counts)]
        return [
            RowScore({"nll": total / n}, total, n) for total, n in zip(sums, counts, strict=True)
        ]

    def metrics(self, scores: Sequence[RowScore]) -> dict[str, float]:
        loss = mean_loss(scores)
        return {
            **mean_outcomes(scores),
            "loss": loss,
            "perplexity": math.exp(min(loss, MAX_EXPONENT)),
        }

    @staticmethod
    def _token_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
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


def _pad_id(tokenizer: Any) -> int:
    """Any token does: no row sees its padding."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def _without_closing(ids: list[int], special: list[int]) -> list[int]:
    """Token ids up to the last one of the text: without the eos or sep that may be added to it.

    >>> _without_closing([1, 17, 18, 2], special=[1, 0, 0, 1])
    [1, 17, 18]
    """
    return ids[: max((i + 1 for i, added in enumerate(special) if not added), default=0)]
