"""Prompts with several answers, of which the likeliest is the model's choice.

A model is trained on the right answer alone, as by :mod:`e2lora.tasks.prompted`. Of every scored
row all choices are compared, and the first of equally likely ones is taken:

* ``accuracy`` (up) by log-likelihood, the sum over the choice's tokens;
* ``accuracy_norm`` (up) by log-likelihood per character of the choice, so that long ones have a
  chance; characters, not tokens, make models with different tokenizers comparable. Both are what
  the field calls acc and acc_norm. What ``answer_prefix`` puts before every choice counts in
  neither.

An answer's end isn't part of what is compared, as is usual: models that were never trained on such
answers say little by it. But where one choice's tokens begin another's, ends are compared too in
this row, since the shorter would always win without. ``nll``, ``loss`` and ``perplexity`` (down)
are those of the right answer with its end.

For comparison: ``majority_baseline``, the accuracy of always taking the place where the right
choice stands most often, and ``chance``, the mean of one by the number of choices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e2lora.config import MultipleChoiceConfig
from e2lora.tasks.choices import (
    Choices,
    choices_in_column,
    choices_in_prompt,
    fewest_inputs,
    num_shared,
    require_choices,
    without_needless_ends,
)
from e2lora.tasks.columns import Numbers, padded
from e2lora.tasks.duplicates import duplicates_of
from e2lora.tasks.prompted import IGNORED, ROW_NUMBER, Prompted, numbered, pad_id, with_context
from e2lora.tasks.prompts import end_of_turn, plain_ids
from e2lora.tasks.rows import (
    carve_validation,
    content_of,
    read_splits,
    require_filled,
    shown,
    source_name,
)
from e2lora.tasks.scores import RowScore
from e2lora.tasks.task import Direction

PROMPT, CHOICES, PLACE = "__prompt__", "__choices__", "__place__"
OF_ROWS = ("skipped", "split", "row")  # features of scored rows that are one number each


class MultipleChoice(Prompted):
    """See :class:`e2lora.tasks.Task`. Rows are checked when read, their lengths in ``features``."""

    config: MultipleChoiceConfig
    directions: Mapping[str, Direction | None] = {
        "accuracy": "maximize",
        "accuracy_norm": "maximize",
        "nll": "minimize",
        "majority_baseline": None,
        "chance": None,
        "loss": "minimize",
        "perplexity": "minimize",
    }

    def __init__(self, config: MultipleChoiceConfig) -> None:
        super().__init__(config)
        optional = (config.context_column, config.choices_column)
        columns = [config.prompt_column, config.answer_column, *filter(None, optional)]
        splits = read_splits(config, columns)
        for split, rows in splits.items():
            if rows is not None:
                splits[split] = numbered(self._asked(rows.select_columns(columns), split))
        self._rows = carve_validation(splits, config)
        self.splits = tuple(self._rows)
        self.duplicates = duplicates_of(self._rows, [PROMPT, CHOICES])
        self._choices = {split: rows[CHOICES][:] for split, rows in self._rows.items()}
        self._places = {split: rows[PLACE][:] for split, rows in self._rows.items()}
        self._majority = {s: Counter(p).most_common(1)[0][0] for s, p in self._places.items()}

    # ---- rows ---------------------------------------------------------------------------------

    def _asked(self, rows: Any, split: str) -> Any:
        """Rows with the prompt, the choices and the place of the right one.

        Raises:
            ValueError: a row that can't be used.
        """
        config = self.config
        texts = [name for name in (config.prompt_column, config.context_column) if name]
        require_filled(rows, texts, str, split, config)
        require_filled(rows, [config.answer_column], (str, int), split, config)
        asked: dict[str, list[Any]] = {PROMPT: [], CHOICES: [], PLACE: []}
        for number, row in enumerate(rows):
            prompt = with_context(row[texts[0]], "".join(row[name] for name in texts[1:]))
            try:
                choices = self._choices_of(row, prompt)
                require_choices(choices.texts)
                place = choices.place_of(row[config.answer_column])
            except ValueError as error:
                raise ValueError(
                    f"{error} This is {split} row {number} of {source_name(config, split)!r}: "
                    f"{shown(row)}. Correct or drop the row."
                ) from error
            for column, value in zip(asked.values(), (prompt, choices.texts, place), strict=True):
                column.append(value)
        for name, column in asked.items():
            rows = rows.add_column(name, column)
        return rows.select_columns(list(asked))

    def _choices_of(self, row: Mapping[str, Any], prompt: str) -> Choices:
        config = self.config
        if config.choices_column:
            return choices_in_column(row[config.choices_column])
        if config.choices_pattern:
            return choices_in_prompt(config.choices_pattern, prompt)
        assert config.choices is not None, "the configuration names one of three"
        return Choices(config.choices)

    def questions(self, split: str) -> list[str]:
        return self._rows[split][PROMPT][:]

    def answers(self, split: str) -> list[str]:
        pairs = zip(self._choices[split], self._places[split], strict=True)
        return [self._answering(choices[place]) for choices, place in pairs]

    def _answering(self, choice: str) -> str:
        """The choice as it is answered with; a turn of a chat needs no space before it."""
        prefix = self.config.answer_prefix
        return (prefix.lstrip() if self.config.chat else prefix) + choice

    def content(self, split: str) -> str:
        """Of training rows only the right choice is read."""
        content = super().content(split)
        if split == "train":
            return content
        return content_of(self.config, [[content], self._choices[split], self._places[split]])

    def features(self, split: str, tokenizer: Any) -> list[dict[str, Any]]:
        """Those of prompts with the right answer; of rows that are scored also all choices.

        ``choice_ids``: what is compared of each choice, one after another, ``choice_sizes`` tokens
        of each, the first ``skipped`` of which are the prefix's in all of them. ``split`` and
        ``row`` number the split and the row in it.

        Raises:
            ValueError: see :class:`Prompted`; a choice that doesn't fit within ``max_length``.
        """
        features = super().features(split, tokenizer)
        if split == "train":
            return features
        closed = self._closed(split, tokenizer)
        end = len(end_of_turn(tokenizer)) if self.config.chat else 1
        (prefix,) = plain_ids(tokenizer, [self._answering("")])
        for number, (row, choices) in enumerate(zip(features, closed, strict=True)):
            self._require_room_for(split, number, _num_prompt_tokens(row), choices)
            compared = without_needless_ends(choices, end)
            row["choice_ids"] = [token for choice in compared for token in choice]
            row["choice_sizes"] = [len(choice) for choice in compared]
            row["skipped"] = num_shared([prefix, *choices])
            row["split"], row["row"] = self.splits.index(split), number
        return features

    def _closed(self, split: str, tokenizer: Any) -> list[list[list[int]]]:
        """Token ids of every choice of every row, with its end."""
        rows = self._choices[split]
        prompts = [p for p, row in zip(self.questions(split), rows, strict=True) for _ in row]
        answers = [self._answering(choice) for row in rows for choice in row]
        ids = self.prompter.answer_ids(tokenizer, prompts, answers)
        ends = accumulate(map(len, rows), initial=0)
        return [ids[begin:end] for begin, end in pairwise(ends)]

    def _require_room_for(
        self, split: str, row: int, num_prompt: int, choices: Sequence[Sequence[int]]
    ) -> None:
        longest = max(map(len, choices))
        if num_prompt + longest > self.config.max_length:
            number = self._rows[split][ROW_NUMBER][row]
            raise ValueError(
                "choices are compared whole, so a prompt with the longest must fit within "
                f"`max_length`; {split} row {number} of {source_name(self.config, split)!r} has "
                f"{num_prompt} prompt tokens and a choice of {longest}, max_length is "
                f"{self.config.max_length}. Raise `max_length` or drop the row."
            )

    # ---- batches and scores -------------------------------------------------------------------

    def collate(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Of training rows as ever; of others all that one forward pass scores their choices by.

        ``input_ids`` and ``attention_mask`` hold as few sequences as continue each row's prompt in
        every way; ``sequence`` and ``place`` say for every token that is scored, ``token``, which
        logits predict it, where places count back from the end: -1 is the last. Row after row come
        ``sizes`` tokens of the right answer with its end and of each choice.
        """
        if "choice_ids" not in rows[0]:
            return super().collate(rows, tokenizer)
        sequences: list[Numbers] = []
        scored: list[tuple[int, int, int]] = []
        sizes: list[int] = []
        for row in rows:
            prompt_size = _num_prompt_tokens(row)
            prompt, answer = np.split(np.asarray(row["input_ids"]), [prompt_size])
            choices = np.split(np.asarray(row["choice_ids"]), np.cumsum(row["choice_sizes"])[:-1])
            continuations = [ids.tolist() for ids in (answer, *choices)]
            inputs, taken = fewest_inputs(continuations)
            for ids, k in zip(continuations, taken, strict=True):
                first = prompt_size - 1  # its logits predict the token behind it
                scored += [(len(sequences) + k, first + i, token) for i, token in enumerate(ids)]
                sizes.append(len(ids))
            sequences += [np.concatenate([prompt, ids]).astype(np.int64) for ids in inputs]
        sequence, place, token = torch.tensor(scored).unbind(1)
        input_ids = padded(sequences, pad_id(tokenizer))
        return {
            "input_ids": input_ids,
            "attention_mask": padded([np.ones(len(ids), int) for ids in sequences], 0),
            "sequence": sequence,
            "place": place - input_ids.shape[1],
            "token": token,
            "sizes": torch.tensor(sizes),
            **{name: torch.tensor([int(row[name]) for row in rows]) for name in OF_ROWS},
        }

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        losses = iter(continuation_losses(model, batch))
        scores = []
        for skipped, split, row in zip(*(batch[name].tolist() for name in OF_ROWS), strict=True):
            name = self.splits[split]
            answer = next(losses)
            choices = self._choices[name][row]
            sums = np.array([-next(losses)[skipped:].sum().item() for _ in choices])
            scores.append(self._row_score(name, row, answer.sum().item(), len(answer), sums))
        return scores

    def _row_score(
        self, split: str, row: int, loss: float, supervised: int, likelihoods: np.ndarray
    ) -> RowScore:
        """
        Args:
            loss: of the right answer with its end, summed over ``supervised`` tokens.
            likelihoods: the logarithm of each choice's.
        """
        choices, right = self._choices[split][row], self._places[split][row]
        chosen = int(likelihoods.argmax())  # the first of equals
        chosen_norm = int((likelihoods / [len(choice) for choice in choices]).argmax())
        outcomes = {
            "accuracy": float(chosen == right),
            "accuracy_norm": float(chosen_norm == right),
            "nll": loss / supervised,
            "majority_baseline": float(self._majority[split] == right),
            "chance": 1 / len(choices),
        }
        return RowScore(outcomes, loss, supervised, choices[chosen], choices[right])


def continuation_losses(model: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Of each row the losses of its answer's tokens, then of each choice's: float64, on the CPU.

    By a single forward pass, so that workers that share weights keep step.
    """
    logits = _last_logits(model, batch, int(-batch["place"].min()))
    chosen = logits[batch["sequence"], batch["place"]].float()
    losses = torch.nn.functional.cross_entropy(chosen, batch["token"], reduction="none")
    return list(losses.cpu().double().split(batch["sizes"].tolist()))


def _num_prompt_tokens(row: Mapping[str, Any]) -> int:
    return int((np.asarray(row["labels"]) == IGNORED).sum())


def _last_logits(model: Any, batch: Mapping[str, Tensor], count: int) -> Tensor:
    """At the last ``count`` tokens of each sequence at least: [sequences, tokens, vocabulary].

    Logits are by far the largest tensor here, and of a prompt's none are needed; but few models
    can't do without.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if "logits_to_keep" in signature(inner.forward).parameters:
        inputs["logits_to_keep"] = count
    return model(**inputs, use_cache=False).logits
