"""What a model writes is what its logits say, one prompt at a time, without cache and padding."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from e2lora.adapters import adapt
from e2lora.config import AdapterConfig, GenerationConfig, ModelConfig, PlanConfig
from e2lora.generation import require_room, write
from e2lora.models import load_base
from e2lora.plan import build_plan
from e2lora.targets import find_targets
from tests.conftest import data_folder, model_folder

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
PAD, END, OTHER_END = 0, 1, 2
TOKENS = ("<pad>", "</s>", "<end>", *LETTERS, "ab", "</", "ÿ")
PROMPTS = [[3, 4], [9], [5, 20, 7, 8, 11, 4, 4, 3], [16] * 5, [25, 3, 9]]
NUMBERS = range(100, 105)


def tiny_tokenizer(pad: bool = True) -> Any:
    """One token per letter, and a few longer ones."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, TOKENS[0]))
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_model(kind: str, positions: int = 64) -> Any:
    """A random one, sharp enough for its answers to depend on all that stands before."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(3)
    sizes: Any = {"vocab_size": len(TOKENS), "max_position_embeddings": positions}
    config: Any = (
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            **sizes,
        )
        if kind == "llama"
        else GPT2Config(n_embd=32, n_layer=2, n_head=2, **sizes)
    )
    config.initializer_range = 0.5
    config.bos_token_id = config.pad_token_id = None
    config.eos_token_id = END
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def by_hand(model: Any, prompt: Sequence[int], steps: int, ends: Sequence[int] = (END,)) -> Any:
    """Always the likeliest token, computing all anew at each step."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]).to(model.device), use_cache=False).logits
        if (token := int(logits[0, -1].argmax())) in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def text_of(ids: Sequence[int], special: Sequence[int] = (PAD, END)) -> str:
    return "".join(TOKENS[i] for i in ids if i not in special)


# ---- greedy -----------------------------------------------------------------------------------


def test_batch_writes_what_a_loop_without_cache_and_padding_writes(model: Any) -> None:
    config = GenerationConfig(max_new_tokens=24)
    texts = write(model, tiny_tokenizer(), PROMPTS, config, NUMBERS)
    answers = [by_hand(model, prompt, 24) for prompt in PROMPTS]
    assert texts == [[text_of(answer)] for answer in answers]
    assert len(set(map(str, texts))) == len(PROMPTS), "else the prompts wouldn't matter"


@pytest.mark.parametrize("pad", [True, False])
def test_answers_end_at_every_end_token_and_do_not_hold_it(pad: bool) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(pad)
    free = [by_hand(model, prompt, 24, ends=()) for prompt in PROMPTS]
    common = [t for t, _ in Counter(t for ids in free for t in ids[:12]).most_common(2)]
    model.generation_config.eos_token_id = common[:1]
    model.config.eos_token_id = common[1]
    texts = write(model, tokenizer, PROMPTS, GenerationConfig(max_new_tokens=24), NUMBERS)
    ends = [END, *common]
    answers = [by_hand(model, prompt, 24, ends) for prompt in PROMPTS]
    assert texts == [[text_of(answer, (PAD, END) if pad else (END,))] for answer in answers]
    assert min(map(len, answers)) < 12


def test_nothing_of_the_models_own_generation_config_leaks_in_and_it_stays(model: Any) -> None:
    from transformers import GenerationConfig as Theirs

    config = GenerationConfig(max_new_tokens=12)
    alone = write(model, tiny_tokenizer(), PROMPTS, config, NUMBERS)
    sampled = GenerationConfig(max_new_tokens=12, temperature=1.0)
    alone_sampled = write(model, tiny_tokenizer(), PROMPTS, sampled, NUMBERS)
    own = Theirs(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        num_beams=3,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(3, 20)),
        bad_words_ids=[[21]],
        forced_eos_token_id=OTHER_END,
        min_new_tokens=12,
        max_length=4,
        num_return_sequences=2,
        use_cache=False,
        return_dict_in_generate=True,
        eos_token_id=END,
    )
    before, model.generation_config = model.generation_config, own
    caching, model.config.use_cache = model.config.use_cache, False
    try:
        assert write(model, tiny_tokenizer(), PROMPTS, config, NUMBERS) == alone
        assert write(model, tiny_tokenizer(), PROMPTS, sampled, NUMBERS) == alone_sampled
        assert model.generation_config is own
    finally:
        model.generation_config, model.config.use_cache = before, caching


def test_cache_is_used_whatever_the_models_configuration_says(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = []
    monkeypatch.setattr(model.config, "use_cache", False)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    write(model, tiny_tokenizer(), [[3, 4, 5]], GenerationConfig(max_new_tokens=6), [0])
    handle.remove()
    assert widths[0] == 3
    assert set(widths[1:]) == {1}


def test_adapted_model_writes_what_its_adapters_say() -> None:
    model = tiny_model("llama")
    config = GenerationConfig(max_new_tokens=16)
    plain = write(model, tiny_tokenizer(), PROMPTS, config, NUMBERS)
    plan = build_plan(
        find_targets(model, ("q_proj", "v_proj")), PlanConfig(topology="all", r=4), None
    )
    adapted = adapt(model, plan, AdapterConfig(target_modules=("q_proj", "v_proj"))).eval()
    assert write(adapted, tiny_tokenizer(), PROMPTS, config, NUMBERS) == plain
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    changed = write(adapted, tiny_tokenizer(), PROMPTS, config, NUMBERS)
    assert changed == [[text_of(by_hand(adapted, prompt, 16))] for prompt in PROMPTS]
    assert changed != plain


# ---- stop texts -------------------------------------------------------------------------------


def test_stop_text_ends_an_answer_across_tokens_and_is_cut(model: Any) -> None:
    free = [text_of(by_hand(model, prompt, 24)) for prompt in PROMPTS]
    longest = max(free, key=len)
    stop = (longest[7:10], longest[15:17])
    steps = []
    handle = model.register_forward_pre_hook(lambda *_: steps.append(0))
    config = GenerationConfig(max_new_tokens=24, stop=stop)
    texts = write(model, tiny_tokenizer(), PROMPTS, config, NUMBERS)
    for (text,), whole in zip(texts, free, strict=True):
        assert text == min((whole.partition(s)[0] for s in stop), key=len)
    (alone,) = texts[free.index(longest)]
    assert len(alone) <= 7
    steps.clear()
    write(model, tiny_tokenizer(), [PROMPTS[free.index(longest)]], config, [0])
    handle.remove()
    assert len(steps) <= 10, "it goes on after the stop text"


def test_stop_text_that_begins_in_the_prompt_does_not_end_the_answer(model: Any) -> None:
    answer = text_of(by_hand(model, PROMPTS[0], 8))
    stop = (text_of(PROMPTS[0])[-1] + answer[:1],)
    assert stop[0] not in answer
    config = GenerationConfig(max_new_tokens=8, stop=stop)
    assert write(model, tiny_tokenizer(), PROMPTS[:1], config, [0]) == [[answer]]


def test_answer_keeps_the_space_that_it_begins_with() -> None:
    """Decoded alone, it would lose one, or all."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    model = tiny_model("llama")
    first = by_hand(model, PROMPTS[0], 1)[0]
    words = [f"w{i}" for i in range(len(TOKENS))]
    words[first] = "▁▁▁▁return"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w0"))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")
    config = GenerationConfig(max_new_tokens=1)
    assert write(model, fast, PROMPTS[:1], config, [0]) == [["    return"]]
    assert fast.decode([first]) != "    return"


# ---- by chance --------------------------------------------------------------------------------


def test_sampled_answers_depend_on_seed_row_and_sample_alone(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    config = GenerationConfig(max_new_tokens=12, temperature=1.5, top_p=0.9, num_samples=3, seed=5)
    torch.manual_seed(1)
    together = write(model, tokenizer, PROMPTS, config, NUMBERS)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    order = [3, 0, 4]
    again = write(
        model, tokenizer, [PROMPTS[i] for i in order], config, [NUMBERS[i] for i in order]
    )
    assert again == [together[i] for i in order]
    alone = [
        write(model, tokenizer, [prompt], config, [number])[0]
        for prompt, number in zip(PROMPTS, NUMBERS, strict=True)
    ]
    assert alone == together
    assert torch.equal(torch.get_rng_state(), state), "training goes on with the same chance"
    assert all(len(set(texts)) == 3 for texts in together)
    fewer = config.model_copy(update={"num_samples": 1})
    assert write(model, tokenizer, PROMPTS, fewer, NUMBERS) == [texts[:1] for texts in together]
    other = config.model_copy(update={"seed": 6})
    assert write(model, tokenizer, PROMPTS, other, NUMBERS) != together
    assert write(model, tokenizer, PROMPTS, config, range(5)) != together
    same = write(model, tokenizer, [PROMPTS[0]] * 40, fewer, range(40))
    assert len(set(map(str, same))) > 20, "rows of one prompt differ"


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
def test_frequencies_of_sampled_tokens_are_those_of_softmax(
    temperature: float, top_p: float
) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data /= 4  # flat enough for many tokens to occur
    prompt, draws = [6, 9], 6000
    with torch.no_grad():
        shares = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(0)
    order = shares.argsort(descending=True).tolist()
    size = 1 + sum(shares[order[:n]].sum() < top_p for n in range(1, len(order)))
    expected = shares[order[:size]] / shares[order[:size]].sum() * draws
    config = GenerationConfig(max_new_tokens=1, temperature=temperature, top_p=top_p)
    texts = write(model, tiny_tokenizer(), [prompt] * draws, config, range(draws))
    counts = Counter(text for (text,) in texts)
    wanted = dict.fromkeys(
        (text_of([i]) for i in order[:size]), 0.0
    )  # <pad> and </s> both show no text
    for token, number in zip(order, expected.tolist(), strict=False):
        wanted[text_of([token])] += number
    assert set(counts) <= set(wanted)
    assert len(wanted) > (4 if top_p < 1 else 20)
    ordered = sorted(wanted, key=wanted.__getitem__)
    rare = [text for text in ordered if wanted[text] < 5]
    often = [text for text in ordered if wanted[text] >= 5]
    seen = [*(counts[t] for t in often[1:]), counts[often[0]] + sum(counts[t] for t in rare)]
    due = [*(wanted[t] for t in often[1:]), wanted[often[0]] + sum(wanted[t] for t in rare)]
    assert chisquare(seen, due).pvalue > 0.01


# ---- what is refused --------------------------------------------------------------------------


def test_prompt_that_leaves_no_room_in_the_models_positions_is_refused(model: Any) -> None:
    config = GenerationConfig(max_new_tokens=60)
    require_room(model, [[3] * 4], config)
    message = r"fit the model's 64 positions; got a prompt of 5 .*max_new_tokens=60\. Lower"
    with pytest.raises(ValueError, match=message):
        write(model, tiny_tokenizer(), [[3], [3] * 5], config, [0, 1])
    with pytest.raises(ValueError, match="needs a token; got one without"):
        write(model, tiny_tokenizer(), [[3], []], config, [0, 1])


# ---- a real model -----------------------------------------------------------------------------


@pytest.mark.long
def test_smollm_answers_prompts_of_many_lengths_together_as_alone() -> None:
    from transformers import AutoModelForCausalLM

    config = ModelConfig(name=model_folder("smollm2-135m"))
    with open(Path(data_folder("gsm8k")) / "test.jsonl", encoding="utf-8") as lines:
        questions = sorted((json.loads(line)["question"] for line in list(lines)[:60]), key=len)
    base = load_base(config, AutoModelForCausalLM, None, torch.float32)
    prompts = [base.processor(q + "\nAnswer:")["input_ids"] for q in questions[::18]]
    assert len({len(prompt) for prompt in prompts}) == 4
    generation = GenerationConfig(max_new_tokens=12)
    together = write(base.model, base.processor, prompts, generation, range(4))
    assert together[:2] == [
        [base.processor.decode(by_hand(base.model, prompt, 12, [base.processor.eos_token_id]))]
        for prompt in prompts[:2]
    ]
    alone = [write(base.model, base.processor, [p], generation, [0])[0] for p in prompts]
    assert together == alone
