"""How a row's prompt is put to a causal model, and how the answer to it ends.

In a chat, the tokenizer's template decides; elsewhere the task's own, with worked examples above it
and a blank line between them. Prompt and answer become tokens apart from each other, as when the
model writes: so a prompt's token ids always begin those of the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from e2lora.config.tasks import PromptsConfig

BLANK_LINE = "\n\n"
Turn = dict[str, str]


@dataclass(frozen=True)
class Prompter:
    """Puts prompts as a task's configuration says.

    Attributes:
        examples: prompt and answer of ``num_shots`` training rows and a spare one, all different.
    """

    config: PromptsConfig
    examples: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, config: PromptsConfig, prompts: Sequence[str], answers: Sequence[str]) -> Prompter:
        """With examples out of these training rows, chosen by ``split_seed``.

        Raises:
            ValueError: too few rows.
        """
        if config.num_shots == 0:
            return cls(config)
        chosen: dict[str, str] = {}
        for row in np.random.default_rng(config.split_seed).permutation(len(prompts)):
            if prompts[row] not in chosen and answers[row].strip():
                chosen[prompts[row]] = answers[row]
            if len(chosen) > config.num_shots:
                return cls(config, tuple(chosen.items()))
        raise ValueError(
            "worked examples come from the training rows, and no row's are its own, so there must "
            f"be num_shots + 1 rows of different prompts with an answer; got num_shots="
            f"{config.num_shots} and {len(chosen)} such rows in {config.data!r}. Lower `num_shots`."
        )

    def shots(self, prompt: str) -> list[tuple[str, str]]:
        """The same for every row, but none of the row's own prompt: the spare one stands in.

        >>> config = PromptsConfig(data="any", num_shots=1)
        >>> prompter = Prompter(config, (("1+1", "2"), ("2+2", "4")))
        >>> prompter.shots("5+5"), prompter.shots("1+1")
        ([('1+1', '2')], [('2+2', '4')])
        """
        others = [example for example in self.examples if example[0] != prompt]
        return others[: self.config.num_shots]

    def text(self, prompt: str) -> str:
        """All that stands before the answer, outside of a chat.

        >>> config = PromptsConfig(data="any", template="Q: {prompt}\\nA:", num_shots=1)
        >>> print(Prompter(config, (("1+1", " 2"), ("2+2", " 4"))).text("5+5"))
        Q: 1+1
        A: 2
        <BLANKLINE>
        Q: 5+5
        A:
        """
        blocks = [self._filled(shot) + answer for shot, answer in self.shots(prompt)]
        return BLANK_LINE.join([*blocks, self._filled(prompt)])

    def turns(self, prompt: str) -> list[Turn]:
        """All that stands before the answer in a chat; a turn needs no white space at its end."""
        system = self.config.system
        turns = [] if system is None else [{"role": "system", "content": system}]
        for shot, answer in self.shots(prompt):
            turns += [self._asked(shot), {"role": "assistant", "content": answer}]
        return [*turns, self._asked(prompt)]

    def _filled(self, prompt: str) -> str:
        # The template may hold other braces too, which str.format would take for its own.
        return self.config.template.replace("{prompt}", prompt)

    def _asked(self, prompt: str) -> Turn:
        return {"role": "user", "content": self._filled(prompt).rstrip()}

    def stop(self) -> tuple[str, ...]:
        """What a model that goes on after its answer would begin another block with.

        A blank line alone counts only where no worked answer holds one.
        """
        if not self.examples or self.config.chat:
            return ()
        next_block = BLANK_LINE + self.config.template.partition("{prompt}")[0].rstrip()
        return () if any(next_block in answer for _, answer in self.examples) else (next_block,)

    def prompt_ids(self, tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of what stands before each answer, begun as the tokenizer begins a text.

        Raises:
            ValueError: a chat, and the tokenizer has no template, or one that can't.
        """
        if self.config.chat:
            asked = rendered(tokenizer, [self.turns(p) for p in prompts], answering=True)
            return plain_ids(tokenizer, asked)
        encoded = tokenizer([self.text(p) for p in prompts], return_special_tokens_mask=True)
        return [
            _without_closing(ids, special)
            for ids, special in zip(
                encoded["input_ids"], encoded["special_tokens_mask"], strict=True
            )
        ]

    def answer_ids(
        self, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
    ) -> list[list[int]]:
        """Token ids of each answer with its end: eos, or in a chat the end of the turn.

        Raises:
            ValueError: the tokenizer has no eos; its chat template puts an answer otherwise than
                behind what it asks for one with.
        """
        if not self.config.chat:
            end = [require_eos(tokenizer)]
            return [[*ids, *end] for ids in plain_ids(tokenizer, answers)]
        end = end_of_turn(tokenizer)
        turns = [self.turns(prompt) for prompt in prompts]
        asked = rendered(tokenizer, turns, answering=True)
        answered = rendered(
            tokenizer,
            [
                [*before, {"role": "assistant", "content": answer}]
                for before, answer in zip(turns, answers, strict=True)
            ],
        )
        closing = _after_an_answer(tokenizer)
        for prompt, whole in zip(asked, answered, strict=True):
            if not (whole.startswith(prompt) and whole.endswith(closing)):
                raise ValueError(
                    "a chat template must put an answer right behind what it asks for one with; "
                    f"that of {tokenizer.name_or_path!r} makes {prompt[-80:]!r} of a prompt, and "
                    f"{whole[-160:]!r} of prompt and answer. Name another model, or set chat=False."
                )
        texts = [
            whole[len(prompt) : len(whole) - len(closing)]
            for prompt, whole in zip(asked, answered, strict=True)
        ]
        return [[*ids, *end] for ids in plain_ids(tokenizer, texts)]


def rendered(
    tokenizer: Any, conversations: Sequence[Sequence[Turn]], answering: bool = False
) -> list[str]:
    """Texts by the tokenizer's chat template.

    Args:
        answering: with what an answer begins with.

    Raises:
        ValueError: there is no template, or it refuses.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            f"chat=True needs a tokenizer with a chat template; {tokenizer.name_or_path!r} has "
            "none. Name an instruction-tuned model, or set chat=False."
        )
    try:
        return tokenizer.apply_chat_template(
            list(conversations), tokenize=False, add_generation_prompt=answering
        )
    except TemplateError as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} refuses the conversation "
            f"{conversations[0]}: {error}. Leave out `system`, if it is that, or set chat=False."
        ) from error


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, with nothing added."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def require_eos(tokenizer: Any) -> int:
    """
    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "every answer ends with the tokenizer's eos token, as causal models are trained with; "
            f"{tokenizer.name_or_path!r} has none. Name a causal model, or set `eos_token` in its "
            "tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def end_of_turn(tokenizer: Any) -> list[int]:
    """What a chat template puts after an answer, up to the special token that ends it.

    Where it puts none, the answer ends with eos.

    Raises:
        ValueError: there is neither; see also :func:`rendered`.
    """
    (ids,) = plain_ids(tokenizer, [_after_an_answer(tokenizer)])
    added = tokenizer.added_tokens_decoder
    for place, token in enumerate(ids):
        if token in tokenizer.all_special_ids or (token in added and added[token].special):
            return ids[: place + 1]
    return [require_eos(tokenizer)]


def _after_an_answer(tokenizer: Any) -> str:
    answer = "answer"
    turns = [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": answer}]
    (whole,) = rendered(tokenizer, [turns])
    return whole.rpartition(answer)[2]


def _without_closing(ids: list[int], special: list[int]) -> list[int]:
    """Token ids up to the last one of the text: without the eos or sep that may be added to it.

    >>> _without_closing([1, 17, 18, 2], special=[1, 0, 0, 1])
    [1, 17, 18]
    """
    return ids[: max((i + 1 for i, added in enumerate(special) if not added), default=0)]
