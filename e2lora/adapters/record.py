"""What stands beside an adapter's weights: the record for programs, the card for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from e2lora.adapters.family import Ability
from e2lora.config import AdapterConfig, Frozen, ModelConfig, TrialConfig, system_name
from e2lora.plan import SharingPlan
from e2lora.records import Evaluation

VERSION: Literal[2] = 2
READERS: Mapping[Ability, str] = {
    "peft": "PEFT",
    "portable": "vLLM and llama.cpp",
    "merge": "transformers",
}


class BaseRecord(Frozen):
    """What is needed to load the base model again."""

    weights_fingerprint: str
    model: ModelConfig | None = Field(description="None: a model that has no name")
    architecture: str = Field(description="its class in transformers")
    num_labels: int | None = Field(description="of a classifier")
    dtype: str = Field(description="in which the fingerprint was taken, e.g. bfloat16")


class AdapterRecord(Frozen):
    """``e2lora.json``: what the weights belong to."""

    version: Literal[2] = VERSION
    base: BaseRecord
    adapter: AdapterConfig
    head: tuple[str, ...]
    frozen_fingerprint: str = ""


@dataclass(frozen=True)
class Count:
    """Parameters of an adapter, each shared tensor once.

    ``adapter``, ``head``: trained; ``kept``: those of the adapter that weren't masked or pruned on
    the way, or grew; ``ranks``: kept and held, over all groups, where a family prunes or grows.
    """

    adapter: int
    head: int
    kept: int
    ranks: tuple[int, int] | None = None


def adapter_card(
    record: AdapterRecord,
    plan: SharingPlan,
    count: Count,
    lacks: Mapping[Ability, str],
    trial: TrialConfig | None = None,
    evaluation: Evaluation | None = None,
) -> str:
    """Markdown, with the header that the Hugging Face hub reads.

    Args:
        lacks: what the family can't be exported as, and why.
        trial: that trained it; None: unknown, and so are task, seeds and metrics.
        evaluation: the last one.
    """
    base, adapter = record.base, record.adapter
    system = system_name(plan.options, adapter)
    name = base.model.name if base.model else base.architecture
    full = adapter.family == "full"
    rows = [
        ("base model", _base_in_words(base)),
        ("system", system if full else f"{system}, r = {plan.options.r}"),
        ("family", adapter.display_name),
        ("trained parameters", f"{count.adapter:,}{_of_lora(count.adapter, plan)}"),
    ]
    if options := _adapter_in_words(adapter):
        rows.insert(3, ("adapter", options))
    if count.kept != count.adapter:
        rows.append(("kept of these", _kept_in_words(count)))
    if record.head:
        rows.append(("head", f"{', '.join(record.head)}: {count.head:,} parameters"))
    if trial:
        rows += [("task", _in_words(trial.task)), ("training", _in_words(trial.training))]
    if evaluation:
        metrics = ", ".join(f"{key} {value:.4g}" for key, value in evaluation.metrics.items())
        rows.append((f"at step {evaluation.step}", metrics))
    if seeds := _seeds(record, plan, trial):
        rows.append(("seeds", ", ".join(f"{seed} ({of})" for of, seed in seeds.items())))
    sections = [
        _header(base),
        f"# {system} for {name}",
        _table(("", ""), rows),
        *([] if full else ["## Plan", _plan_in_words(plan), _plan_table(plan)]),
        "## Loading",
        f"```python\n{loading_lines(base, head=record.head)}```",
        "Run from this folder, or name it in the last line. Only safetensors and JSON are read. "
        + _other_readers(record, lacks),
    ]
    return "\n\n".join(sections) + "\n"


def _other_readers(record: AdapterRecord, lacks: Mapping[Ability, str]) -> str:
    rounds = bool(record.base.model and record.base.model.quantization)
    readers = [
        reader
        for ability, reader in READERS.items()
        if ability not in lacks and not (ability == "merge" and rounds)
    ]
    if not readers:
        return f"Nothing else loads it: {lacks['peft']}."
    return f"e2lora's `jobs/export.py` makes what {' or '.join(readers)} can load without e2lora."


def export_card(
    record: AdapterRecord, base: BaseRecord, plan: SharingPlan, form: str, dtype: str
) -> str:
    """Markdown for an export: what it is, and how it is loaded without this project.

    Args:
        base: the record's, with the model that was taken.
        dtype: of a merged model.
    """
    system = system_name(plan.options, record.adapter)
    what = {
        "peft": "A PEFT adapter, every layer with tensors of its own.",
        "portable": "A plain LoRA adapter of one rank, its scale folded into B.",
        "merged": "A model with the adapter merged into its weights.",
    }[form]
    if form == "merged":
        last = f'model = {base.architecture}.from_pretrained(".", dtype=torch.{dtype})'
        lines = ["import torch", f"from transformers import {base.architecture}", "", last]
        code = "\n".join(lines) + "\n"
    else:
        code = loading_lines(
            base, "from peft import PeftModel", "PeftModel.from_pretrained", record.head
        )
    sections = [
        _header(base),
        f"# {system}, r = {plan.options.r}, {form}",
        f"{what} Base model: {_base_in_words(base)}.",
        f"```python\n{code}```",
    ]
    return "\n\n".join(sections) + "\n"


def loading_lines(
    base: BaseRecord,
    imports: str = "import e2lora",
    function: str = "e2lora.load",
    head: Sequence[str] = (),
) -> str:
    """Python that loads the base and the adapter on it; ``head`` is left out of quantisation."""
    model = base.model or ModelConfig(name="BASE_MODEL")
    is_asset = model.name.startswith("demo:")
    options: dict[str, Any] = {} if model.revision is None else {"revision": model.revision}
    if base.num_labels is not None:
        options["num_labels"] = base.num_labels
    written = [f'resolve("{model.name}")' if is_asset else f'"{model.name}"']
    options |= model.config_overrides
    written += [f"{key}={_literal(value)}" for key, value in options.items()]
    written.append(f"dtype=torch.{base.dtype}")
    classes = [base.architecture]
    if model.quantization:
        classes.append("BitsAndBytesConfig")
        written.append(f"quantization_config={_quantization(base.dtype, head)}")
    lines = [
        "import torch",
        f"from transformers import {', '.join(sorted(classes))}",
        "",
        imports,
        *(["from e2lora.assets import resolve"] if is_asset else []),
        "",
        f"base = {base.architecture}.from_pretrained(",
        *(f"    {argument}," for argument in written),
        ")",
        f'model = {function}(base, ".")',
    ]
    return "\n".join(lines) + "\n"


def _quantization(dtype: str, head: Sequence[str]) -> str:
    """As :func:`e2lora.quantized.nf4` has it."""
    options = [
        "load_in_4bit=True",
        'bnb_4bit_quant_type="nf4"',
        "bnb_4bit_use_double_quant=True",
        f"bnb_4bit_compute_dtype=torch.{dtype}",
        *([f"llm_int8_skip_modules={json.dumps(head)}"] if head else []),
    ]
    inner = "".join(f"        {option},\n" for option in options)
    return f"BitsAndBytesConfig(\n{inner}    )"


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _header(base: BaseRecord) -> str:
    """YAML; the base is named where it is one that the hub may have."""
    name = base.model.name if base.model else ""
    on_hub = name and not name.startswith("demo:") and not Path(name).exists()
    lines = [f"base_model: {name}"] if on_hub else []
    return "\n".join(["---", *lines, "library_name: peft", "tags:", "- e2lora", "---"])


def _base_in_words(base: BaseRecord) -> str:
    named = "" if base.model is None else base.model.name
    if base.model and base.model.revision:
        named += f" at {base.model.revision}"
    dtype = base.dtype
    if base.model and base.model.quantization:
        dtype = f"{base.model.quantization.upper()} (bitsandbytes), {dtype}"
    kind = f"{base.architecture}, {dtype}, weights {base.weights_fingerprint}"
    return f"{named} ({kind})" if named else kind


def _of_lora(count: int, plan: SharingPlan) -> str:
    if not plan.lora_parameters:
        return ""
    return f", {count / plan.lora_parameters:.0%} of LoRA's {plan.lora_parameters:,}"


def _adapter_in_words(adapter: AdapterConfig) -> str:
    """What differs from the family's defaults; modules and seeds are told elsewhere."""
    told = adapter.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"family", "target_modules", "projection_seed"},
    )
    own = told.pop(adapter.family, {})
    return ", ".join(_pairs({**told, **own}))


def _kept_in_words(count: Count) -> str:
    words = f"{count.kept:,} ({count.kept / count.adapter:.0%})"
    if count.ranks:
        words += ", {} of {} ranks".format(*count.ranks)
    return words


def _in_words(options: Frozen) -> str:
    """What differs from the defaults."""
    told = options.model_dump(mode="json", exclude_defaults=True)
    return ", ".join([*([options.kind] if hasattr(options, "kind") else []), *_pairs(told)])


def _pairs(options: dict[str, Any]) -> list[str]:
    return [f"{key} {value}" for key, value in options.items() if key != "kind"]


def _seeds(record: AdapterRecord, plan: SharingPlan, trial: TrialConfig | None) -> dict[str, int]:
    seeds = {} if trial is None else {"trial": trial.seed}
    if record.frozen_fingerprint:
        seeds["projections"] = record.adapter.projection_seed or 0
    if plan.measured_on:
        seeds["gradient profile"] = plan.measured_on.seed
    return seeds


def _plan_in_words(plan: SharingPlan) -> str:
    chosen = ", ".join(_pairs(plan.options.model_dump(mode="json", exclude_defaults=True)))
    words = f"Layers of a group share one adapter of rank r; {chosen or 'default options'}."
    if plan.budgets:
        spent, available = (
            sum(getattr(b, k) for b in plan.budgets) for k in ("spent", "available")
        )
        words += f" Of the budget of {available:,} units of rank {spent:,} are spent."
    return words


def _plan_table(plan: SharingPlan) -> str:
    rows = [
        (
            f"`{module_type}`",
            str(len(groups)),
            " ".join(group.span for group in groups),
            " ".join(str(group.r) for group in groups),
        )
        for module_type in plan.module_types
        for groups in [plan.groups_of(module_type)]
    ]
    return _table(("module type", "groups", "layers", "ranks"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
