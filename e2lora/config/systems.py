"""Sharing systems by name, and how a space suggests one.

What only some systems have is asked of those alone: the size of blocks, E²'s allocation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from e2lora.config.plan import PRESETS


class System(NamedTuple):
    """Options of a plan and of an adapter that make a sharing system."""

    plan: Mapping[str, Any]
    adapter: Mapping[str, Any] = {}


SYSTEMS: dict[str, System] = {
    "LoRA": System({"topology": "none"}),
    "all-shared": System({"topology": "all"}),
    "blocks": System({"topology": "blocks"}),
    "strided": System({"topology": "strided"}),
    "random": System({"topology": "random", "partition_seed": 0}),
    "matched": System({"topology": "matched"}),
    "ShareLoRA-A": System({"topology": "none"}, {"a_scope": "type"}),
    "ShareLoRA-B": System({"topology": "none"}, {"b_scope": "type"}),
    "E²LoRA": System({"topology": "e2"}),
    "E²LoRA as published": System(PRESETS["e2_published"]),
    "E²ShareLoRA": System({"topology": "e2"}, {"a_scope": "type"}),
    "LSS only": System(PRESETS["lss_only"]),
    "HRA only": System(PRESETS["hra_only"]),
    "E²LoRA by kl": System({"topology": "e2", "similarity": "kl"}),
    "DoRA": System({"topology": "none"}, {"family": "dora"}),
    "E²DoRA": System({"topology": "e2"}, {"family": "dora"}),
    "LoRA-FA": System({"topology": "none"}, {"family": "lora_fa"}),
    "VeRA": System({"topology": "none"}, {"family": "vera"}),
    "RaSA": System({"topology": "none"}, {"family": "rasa"}),
    "HydraLoRA": System({"topology": "none"}, {"family": "hydralora"}),
    "GoRA": System({"topology": "none"}, {"family": "gora"}),
    "IncreLoRA": System({"topology": "none"}, {"family": "increlora"}),
    "BSLoRA": System({"topology": "none"}, {"family": "bslora"}),
    "RaLoRA": System({"topology": "none"}, {"family": "ralora"}),
}
"""By the names that reports use, where these don't depend on a system's options."""

CONTROLS = ("random", "matched")
"""As many intervals as E² finds, cut without looking at gradients: do its cuts matter?"""


def suggest_system(
    trial: Any,
    names: Sequence[str],
    *,
    block_sizes: Sequence[int] = (2,),
    strides: Sequence[int] = (2,),
    allocations: Sequence[str] = ("entropy_power",),
) -> System:
    """One of the systems, as the trial suggests it: ``system``, and what that one asks for more.

    ``block_size`` is suggested for blocks, ``stride`` for strided sharing and ``allocation`` for
    E²LoRA: of each only where there is a choice.

    >>> import types
    >>> first = types.SimpleNamespace(suggest_categorical=lambda name, choices: choices[0])
    >>> suggest_system(first, ("blocks", "LoRA"), block_sizes=(3, 6)).plan
    {'topology': 'blocks', 'block_size': 3}
    """
    name = trial.suggest_categorical("system", tuple(names))
    choices = {
        "blocks": ("block_size", block_sizes),
        "strided": ("stride", strides),
        "E²LoRA": ("allocation", allocations),
    }
    plan, adapter = SYSTEMS[name]
    if name in choices:
        option, values = choices[name]
        chosen = trial.suggest_categorical(option, tuple(values)) if values[1:] else values[0]
        plan = {**plan, option: chosen}
    return System(plan, adapter)


def cells(
    names: Iterable[str], budgets: Iterable[int], **others: Iterable[Any]
) -> tuple[dict[str, Any], ...]:
    """Every system at every budget, and at every value of other suggestions, as a task.

    >>> cells(("LoRA",), (1000,), task=("sst2",))
    ({'task': 'sst2', 'budget': 1000, 'system': 'LoRA'},)
    """
    named = {**others, "budget": budgets, "system": names}
    return tuple(dict(zip(named, values, strict=True)) for values in product(*named.values()))
