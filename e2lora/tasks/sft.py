"""Supervised fine-tuning of a causal model on prompts and answers, which may be verified.

With ``verify`` the model also writes answers of its own, and ``exact_match`` (up) is the share of
those that come to what the row's answer comes to: see :mod:`e2lora.tasks.answers`. The likelihood
of the given answers is measured in any case: it is the less noisy of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e2lora.config import GenerationConfig, SftConfig
from e2lora.tasks.answers import final_answer, judge
from e2lora.tasks.duplicates import duplicates_of
from e2lora.tasks.prompted import ROW_NUMBER, Prompted, numbered, with_context
from e2lora.tasks.rows import carve_validation, read_splits, require_filled, shown, source_name
from e2lora.tasks.scores import Judgement


class Sft(Prompted):
    """See :class:`e2lora.tasks.Task`. Rows are checked when read, their lengths in ``features``."""

    config: SftConfig

    def __init__(self, config: SftConfig) -> None:
        super().__init__(config)
        columns = [config.prompt_column, config.answer_column]
        others = (config.context_column, config.final_column, config.numbers_column)
        columns += [name for name in others if name]
        splits = read_splits(config, columns)
        for split, rows in splits.items():
            if rows is not None:
                require_filled(rows, columns, str, split, config)
                _require_answers(rows, split, config)
                splits[split] = numbered(rows.select_columns(columns))
        self._rows = carve_validation(splits, config)
        self.splits = tuple(self._rows)
        context = [config.context_column] if config.context_column else []
        self.duplicates = duplicates_of(self._rows, [config.prompt_column, *context])
        if config.verify:
            self._finals = {split: self._final_answers(split) for split in self.splits[1:]}
            if self._finals["validation"]:
                self.directions = {**self.directions, "exact_match": "maximize"}

    def questions(self, split: str) -> list[str]:
        prompts = self._rows[split][self.config.prompt_column][:]
        if self.config.context_column is None:
            return prompts
        contexts = self._rows[split][self.config.context_column]
        return [with_context(*texts) for texts in zip(prompts, contexts, strict=True)]

    def answers(self, split: str) -> list[str]:
        return self._rows[split][self.config.answer_column][:]

    def generation(self, split: str) -> GenerationConfig | None:
        if self.config.verify is None:
            return None
        generation = self.config.generation
        stop = dict.fromkeys((*generation.stop, *self.prompter.stop()))
        return generation.model_copy(update={"stop": tuple(stop)})

    def judge(
        self, split: str, numbers: Sequence[int], texts: Sequence[Sequence[str]]
    ) -> list[Judgement]:
        assert self.config.verify is not None, "only verified tasks have answers written"
        values = self.config.numbers_column and self._rows[split][self.config.numbers_column]
        judgements = []
        for number, written in zip(numbers, texts, strict=True):
            expected = self._finals[split][number]
            of_row = values[number] if values else None
            verdicts = [judge(text, expected, self.config.verify, of_row)[1] for text in written]
            share = sum(verdicts) / len(verdicts)
            text: Any = written[0] if len(written) == 1 else list(written)
            judgements.append(Judgement({"exact_match": share}, text, expected))
        return judgements

    def _final_answers(self, split: str) -> list[str]:
        """What the answers of the rows that are verified come to.

        Raises:
            ValueError: a row whose answer comes to nothing.
        """
        config = self.config
        assert config.verify is not None
        rows = self._rows[split]
        if split == "validation" and config.generation.max_validation_rows is not None:
            rows = rows.select(range(min(len(rows), config.generation.max_validation_rows)))
        if config.final_column:
            return rows[config.final_column][:]
        found: list[str] = []
        values = rows[config.numbers_column] if config.numbers_column else [None] * len(rows)
        for place, answer in enumerate(rows[config.answer_column]):
            final = final_answer(answer, config.verify, values[place])
            if final is None:
                row = rows[place]
                where = f"{split} row {row.pop(ROW_NUMBER)} of {source_name(config, split)!r}"
                raise ValueError(
                    "an answer that is verified must come to something "
                    f"(verify={config.verify!r}); that of {where} doesn't: "
                    f"{shown(row)}. Name a `final_column`, another `verify`, or drop the row; "
                    "generation.max_validation_rows=0 leaves validation rows unanswered."
                )
            found.append(final)
        return found


def _require_answers(rows: Any, split: str, config: SftConfig) -> None:
    if not any(answer.strip() for answer in rows[config.answer_column]):
        raise ValueError(
            f"an answer must be there to be learnt; every {split} row of "
            f"{source_name(config, split)!r} has an empty {config.answer_column!r}. Name the right "
            f"`answer_column`. First row: {rows[0]}"
        )
