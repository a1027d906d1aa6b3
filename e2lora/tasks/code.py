"""Programs that a causal model writes: trained on answers, judged by running tests.

Training rows are prompts and answers. Problems with tests are the test rows, and where these lie in
the same data (MBPP), all rows are. Metrics: those of :mod:`e2lora.tasks.prompted`, and where
programs are run ``pass_at_1`` … (up): only by ``execution="sandbox"``, see
:mod:`e2lora.tasks.sandbox`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e2lora.config import CodeConfig, GenerationConfig
from e2lora.tasks.duplicates import duplicates_of
from e2lora.tasks.pass_at_k import pass_at_k
from e2lora.tasks.problems import PROBLEMS
from e2lora.tasks.prompted import Prompted, numbered, with_context
from e2lora.tasks.rows import carve_validation, read_splits, require_filled, shown
from e2lora.tasks.sandbox import Limits, require_sandbox, run_all
from e2lora.tasks.scores import Judgement

PROMPT, ANSWER = "__prompt__", "__answer__"


class Code(Prompted):
    """See :class:`e2lora.tasks.Task`.

    Raises:
        RuntimeError: programs shall be run, and this machine has no sandbox.
    """

    config: CodeConfig

    def __init__(self, config: CodeConfig) -> None:
        super().__init__(config)
        if config.execution == "sandbox":
            require_sandbox()
        self._problems = PROBLEMS[config.problems]
        columns = self._problems.columns if config.problems_throughout else self._columns()
        splits = read_splits(config, columns, self._problems.columns)
        for split, rows in splits.items():
            if rows is not None:
                splits[split] = numbered(self._asked(rows, split))
        self._rows = carve_validation(splits, config)
        self.splits = tuple(self._rows)
        self.duplicates = duplicates_of(self._rows, [PROMPT])
        if self._is_run("validation"):
            self.directions = {**self.directions, **{f"pass_at_{k}": "maximize" for k in config.k}}

    def _columns(self) -> list[str]:
        config = self.config
        if config.messages_column:
            return [config.messages_column]
        context = [config.context_column] if config.context_column else []
        return [config.prompt_column, config.answer_column, *context]

    def _asked(self, rows: Any, split: str) -> Any:
        """Rows with what the model is asked and shall answer; problems keep their tests.

        Raises:
            ValueError: a row that can't be used.
        """
        config, problems = self.config, self._problems
        kept: tuple[str, ...]
        asked: Sequence[str]
        answered: Sequence[str]
        if split == "test" or config.problems_throughout:
            require_filled(rows, problems.texts, str, split, config)
            kept = problems.columns
            asked = [problems.prompt(row) for row in rows]
            answered = [problems.solution(row) for row in rows]
        elif config.messages_column:
            name = config.messages_column
            require_filled(rows, [name], list, split, config)
            exchanges = [
                _first_exchange(messages, f"{split} row {number}", config)
                for number, messages in enumerate(rows[name])
            ]
            kept, asked, answered = (), *zip(*exchanges, strict=True)
        else:
            columns = self._columns()
            require_filled(rows, columns, str, split, config)
            prompts, answered, *others = (rows[name] for name in columns)
            contexts = others[0] if others else [""] * len(rows)
            kept = ()
            asked = [with_context(*texts) for texts in zip(prompts, contexts, strict=True)]
        rows = rows.add_column(PROMPT, list(asked)).add_column(ANSWER, list(answered))
        return rows.select_columns([*kept, PROMPT, ANSWER])

    def questions(self, split: str) -> list[str]:
        return self._rows[split][PROMPT][:]

    def answers(self, split: str) -> list[str]:
        return self._rows[split][ANSWER][:]

    def _is_run(self, split: str) -> bool:
        if self.config.execution == "off":
            return False
        none = self.config.generation.max_validation_rows == 0
        return split == "test" or (self.config.problems_throughout and not none)

    def generation(self, split: str) -> GenerationConfig | None:
        if not self._is_run(split):
            return None
        generation = self.config.generation
        stop = () if self.config.chat else self._problems.stop
        return generation.model_copy(update={"stop": (*generation.stop, *stop)})

    def judge(
        self, split: str, numbers: Sequence[int], texts: Sequence[Sequence[str]]
    ) -> list[Judgement]:
        """Runs every program; ``prediction`` is, of each, the text and how it ended."""
        rows, config = self._rows[split], self.config
        programs = [
            self._problems.program(rows[number], text)
            for number, written in zip(numbers, texts, strict=True)
            for text in written
        ]
        ran = iter(run_all(programs, Limits(config.seconds, config.memory_mib)))
        judgements = []
        for number, written in zip(numbers, texts, strict=True):
            ends = [next(ran) for _ in written]
            passed = sum(end.passed for end in ends)
            outcomes = {f"pass_at_{k}": pass_at_k(len(written), passed, k) for k in config.k}
            told = [[text, end.reason] for text, end in zip(written, ends, strict=True)]
            judgements.append(Judgement(outcomes, told, rows[number][ANSWER]))
        return judgements


def _first_exchange(messages: Sequence[Any], place: str, config: CodeConfig) -> tuple[str, str]:
    """What the user first asks, and the answer to it.

    Raises:
        ValueError: a conversation that begins otherwise.
    """
    turns = [(turn.get("role"), turn.get("content")) for turn in messages]
    turns = [turn for turn in turns if turn[0] != "system"]
    if [role for role, _ in turns[:2]] != ["user", "assistant"]:
        raise ValueError(
            "a conversation is learnt from its first exchange, a user's turn and the assistant's; "
            f"{place} of {config.data!r} begins with {[role for role, _ in turns[:2]]}: "
            f"{shown({'messages': messages})}. "
            "Correct or drop the row."
        )
    return turns[0][1], turns[1][1]
