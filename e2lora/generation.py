"""Answers that a causal model writes: batches of prompts, greedily or by chance.

Nothing but the configuration decides: of a model's own ``generation_config.json`` only the end
tokens count, not what it says of sampling and penalties. Chance is drawn per seed, row, sample and
position, so it is the same in whatever company, and on however many workers, a row is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e2lora.config import GenerationConfig
from e2lora.tasks.columns import padded
from e2lora.tasks.prompts import end_of_turn

SLACK = 8  # tokens beyond a stop text's bytes that are looked at: such as show no text


def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    numbers: Sequence[int],
    synced: bool = False,
    on_token: Callable[[], None] = lambda: None,
) -> list[list[str]]:
    """``num_samples`` texts for each prompt, without the prompt, special tokens and stop texts.

    Args:
        model: in evaluation mode, with adapters or without.
        prompts: token ids; computed as one batch, once per sample.
        numbers: of the prompts' rows: what chance depends on.
        synced: weights are partitioned, so all workers compute as long as one of them writes; each
            must make as many calls.
        on_token: called at each position, to show that the worker lives.

    Raises:
        ValueError: a prompt without tokens, or that doesn't leave room.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    require_room(model, prompts, config)
    inner = _inner(model)
    ends = _ends(inner, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    input_ids = padded(prompts, pad, side="left").to(model.device)
    mask = padded([np.ones(len(prompt), int) for prompt in prompts], 0, side="left")
    width = input_ids.shape[1]
    written: list[list[str]] = [[] for _ in prompts]
    for sample in range(config.num_samples):
        stops: list[Any] = [_Sign(on_token)]
        stops += [_StopTexts(tokenizer, config.stop, width)] if config.stop else []
        with _blank_generation_config(inner), torch.no_grad():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask.to(model.device),
                generation_config=_whole_config(config, ends, pad),
                logits_processor=LogitsProcessorList(_choosers(config, numbers, sample, width)),
                stopping_criteria=StoppingCriteriaList(stops),
                synced_gpus=synced,
            )
        for texts, prompt, ids in zip(written, prompts, output[:, width:].tolist(), strict=True):
            text = _continuation(tokenizer, prompt, _until(ids, ends))
            texts.append(cut_at(text, config.stop))
    return written


def require_room(model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> None:
    """Refuse a prompt that has no token, or that with its answer exceeds the model's positions.

    Raises:
        ValueError: with the prompt's length.
    """
    longest, shortest = max(map(len, prompts), default=1), min(map(len, prompts), default=1)
    if shortest == 0:
        raise ValueError(
            "an answer's first token is predicted from what stands before it, so every prompt "
            "needs a token; got one without. Drop the row, or add words to `template`."
        )
    text_config = _inner(model).config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and longest + config.max_new_tokens > positions:
        raise ValueError(
            f"a prompt and its answer must fit the model's {positions} positions; got a prompt of "
            f"{longest} tokens and max_new_tokens={config.max_new_tokens}. Lower "
            "`generation.max_new_tokens` or `num_shots`, drop the row, or name another model."
        )


def cut_at(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of the stop texts.

    >>> cut_at("12 eggs\\n\\nQuestion: how", ["Question:", "\\n\\n"])
    '12 eggs'
    """
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def _inner(model: Any) -> Any:
    """Below adapters, the model that generates."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _ends(inner: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: of the tokenizer, its chat template, and the model."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ends |= set(end_of_turn(tokenizer)[-1:])
    for config in (inner.generation_config, inner.config.get_text_config()):
        named = getattr(config, "eos_token_id", None)
        ends |= set(named) if isinstance(named, list | tuple) else {named}
    return ends - {None}


def _whole_config(config: GenerationConfig, ends: set[int], pad: int) -> Any:
    """For transformers: greedy, since :class:`_Chance` leaves a single token to choose."""
    import transformers

    return transformers.GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )


@contextmanager
def _blank_generation_config(inner: Any) -> Iterator[None]:
    """What a configuration leaves out, transformers would take from the model's own."""
    import transformers

    own = inner.generation_config
    inner.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _choosers(
    config: GenerationConfig, numbers: Sequence[int], sample: int, width: int
) -> list[Any]:
    """What is done to the logits, in order."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if config.temperature == 0:
        return []
    chance = np.stack(
        [
            np.random.default_rng([config.seed, number, sample]).random(config.max_new_tokens)
            for number in numbers
        ]
    )
    nucleus = [TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
    return [TemperatureLogitsWarper(config.temperature), *nucleus, _Chance(chance, width)]


class _Chance:
    """Chooses the token in whose share of [0, 1) a given number lies; leaves the others no chance.

    Args:
        chance: float64 [rows, positions].
        width: tokens of the padded prompts.
    """

    def __init__(self, chance: np.ndarray, width: int) -> None:
        self.chance, self.width = torch.from_numpy(chance), width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = self.chance[:, input_ids.shape[1] - self.width].to(scores.device)
        shares = scores.double().softmax(-1).cumsum(-1)
        whole = shares[:, -1]  # 1, up to rounding
        below = torch.minimum(place * whole, whole.nextafter(torch.zeros_like(whole)))
        chosen = torch.searchsorted(shares, below[:, None], right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


class _Sign:
    """Ends no row; is asked at each position."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._on_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _StopTexts:
    """Ends each row whose text holds one of the stop texts."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.window = max(len(text.encode()) for text in stop) + SLACK

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = input_ids[:, self.width :].tolist()
        return torch.tensor([self._stands_in(row) for row in rows], device=input_ids.device)

    def _stands_in(self, ids: list[int]) -> bool:
        """The whole is decoded only where the last tokens look like it: they alone may mislead."""
        return all(
            any(stop in _decoded(self.tokenizer, part) for stop in self.stop)
            for part in (ids[-self.window :], ids)
        )


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """
    >>> _until([5, 6, 2, 0, 0], {2, 9})
    [5, 6]
    """
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _continuation(tokenizer: Any, prompt: Sequence[int], ids: list[int]) -> str:
    """The answer's text as it goes on from the prompt.

    Decoded alone it may lose the space that it begins with, which programs are indented by.
    """
    before = _decoded(tokenizer, prompt)
    whole = _decoded(tokenizer, [*prompt, *ids])
    return whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, ids)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
