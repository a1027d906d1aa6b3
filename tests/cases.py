"""The cases of the contract test: every family × ways of sharing × kinds of models.

What an adapter of a family has to be made of stands here, in two tables written from the method:
a family that is registered and has no line in them fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from e2lora.adapters import FAMILIES, is_head, trainable_parameters
from e2lora.adapters.tensors import Sliced
from e2lora.config import AdapterConfig
from e2lora.moments import Target
from e2lora.plan import SharingPlan
from tests.kinds import KINDS, SHARINGS, Adapted, fill, loss_of, make_base, output_of


class Type(NamedTuple):
    """What a module type contributes to a count: sizes, and the ranks of whatever shares."""

    in_features: int
    out_features: int
    layers: int
    groups: list[int]
    "the rank of each group"
    a: int
    "the ranks of all A of this type, summed"
    b: int
    "likewise of B"
    seen: int
    "the rank that each layer sees, summed"


def _randlora(t: Type) -> int:
    """Per group: n bases of rank r that together have full rank; Λ (r × n) and Γ (n × smaller)."""
    smaller = min(t.in_features, t.out_features)
    return sum(math.ceil(smaller / r) * (r + smaller) for r in t.groups)


def _adalora(t: Type) -> int:
    """B diag(λ) A at the initial rank, half as large again."""
    return sum(3 * r // 2 * (t.in_features + t.out_features + 1) for r in t.groups)


def _increlora(t: Type) -> int:
    """As AdaLoRA, with room for twice the rank."""
    return sum(2 * r * (t.in_features + t.out_features + 1) for r in t.groups)


def _rasa(t: Type) -> int:
    """Private parts and one pool of k = 1 for each layer; and D, whose size is a layer's rank."""
    private, pool = sum(t.groups) - len(t.groups), t.layers
    return (private + pool) * (t.in_features + t.out_features) + t.seen - pool + t.layers * pool


def _hydralora(t: Type) -> int:
    """A and three heads per group, and a router of three rows per layer."""
    pair = t.in_features + 3 * t.out_features
    return sum(t.groups) * pair + 3 * t.layers * t.in_features


# family → trainable parameters of one module type, by method §4
FORMULAS: dict[str, Callable[[Type], int]] = {
    "lora": lambda t: t.a * t.in_features + t.b * t.out_features,
    "lora_plus": lambda t: t.a * t.in_features + t.b * t.out_features,
    "lora_ga": lambda t: t.a * t.in_features + t.b * t.out_features,
    "dora": lambda t: t.a * t.in_features + t.b * t.out_features + t.layers * t.out_features,
    "lora_fa": lambda t: t.b * t.out_features,
    "lori": lambda t: t.b * t.out_features,
    "vera": lambda t: sum(r + t.out_features for r in t.groups),
    "randlora": _randlora,
    "adalora": _adalora,
    "rasa": _rasa,
    "hydralora": _hydralora,
    "gora": lambda t: t.a * t.in_features + t.b * t.out_features,  # what it never exceeds
    "increlora": _increlora,
    "bslora": lambda t: t.a * t.in_features + t.b * t.out_features,  # its local part
    "ralora": lambda t: t.a * t.in_features + t.b * t.out_features,  # however many blocks
    "full": lambda t: 0,  # it has no targets: all weights of the model are counted
}

# family → its trained tensors, by their names in PEFT's layers, and the scope of each; what isn't
# called `weight` there with its own name behind
TENSORS: dict[str, dict[str, str]] = {
    "lora": {"lora_A": "a", "lora_B": "b"},
    "lora_plus": {"lora_A": "a", "lora_B": "b"},
    "lora_ga": {"lora_A": "a", "lora_B": "b"},
    "dora": {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "layer"},
    "lora_fa": {"lora_B": "b"},
    "lori": {"lora_B": "b"},
    "vera": {"vera_lambda_b": "interval", "vera_lambda_d": "interval"},
    "randlora": {"randlora_gamma": "interval", "randlora_lambda": "interval"},
    "adalora": {"lora_A": "interval", "lora_B": "interval", "lora_E": "interval"},
    "rasa": {
        "lora_A.private_weight": "interval",
        "lora_A.pool_weight": "type",
        "lora_B.private_weight": "interval",
        "lora_B.pool_weight": "type",
        "lora_B.diagonal": "layer",
    },
    "hydralora": {"lora_A": "interval", "lora_B": "interval", "lora_router": "layer"},
    "gora": {"lora_A": "interval", "lora_B": "interval"},
    "increlora": {"lora_A": "interval", "lora_B": "interval", "lora_E": "interval"},
    "bslora": {
        "lora_A.local_weight": "interval",
        "lora_A.intra_weight": "depth",
        "lora_A.inter_weight": "model",
        "lora_B.local_weight": "interval",
        "lora_B.intra_weight": "depth",
        "lora_B.inter_weight": "model",
    },
    "ralora": {"lora_A.blocks": "interval", "lora_B.blocks": "interval"},
    "full": {},
}


MERGING = 1e-4  # relative error of outputs after weights were merged in float32
SLICING = 1e-5  # likewise where a narrow layer computes with a part of a wider tensor


# ---- the cases --------------------------------------------------------------------------------


class Case(NamedTuple):
    family: str
    sharing: str
    kind: str

    def __str__(self) -> str:
        return "-".join(self)


def sharings_of(key: str) -> list[str]:
    """How each family is tried on every kind of model."""
    family = FAMILIES[key]
    if key == "full":
        return ["own"]
    names = ["own", "LSS only" if family.no_allocation else "E²"]
    return [*names, "E²ShareLoRA"] if "type" in family.scopes else names


CASES = [
    *(
        Case(key, sharing, kind)
        for key in FAMILIES
        for sharing in sharings_of(key)
        for kind in KINDS
    ),
    *(
        Case("lora", sharing, kind)
        for sharing in SHARINGS
        if sharing not in sharings_of("lora")
        for kind in ("llama", "t5")
    ),
]
SOME_KINDS = ("llama", "gpt2", "roberta")
"""Kinds for what is costly: two shapes, weights that lie transposed, a head of several layers."""
SOME = [case for case in CASES if case.kind in SOME_KINDS]


def able(ability: str) -> list[Case]:
    """Some cases of the families that declare it."""
    return [case for case in SOME if ability not in FAMILIES[case.family].lacks]


def leaves_the_base(case: Case) -> bool:
    names = () if case.family == "full" else KINDS[case.kind].names
    config = AdapterConfig(family=case.family, target_modules=names)  # type: ignore[arg-type]
    return not FAMILIES[case.family].touches_base(config)


def over(cases: list[Case]) -> Any:
    """All of the first kind of models, some of a few others; the rest are long together."""

    def is_quick(case: Case) -> bool:
        shares = case.sharing in ("E²", "LSS only")
        return case.kind == SOME_KINDS[0] or (case.kind in SOME_KINDS and shares)

    marked = [
        pytest.param(case, marks=() if is_quick(case) else pytest.mark.long) for case in cases
    ]
    return pytest.mark.parametrize("case", marked, ids=str)


def adapted_as(case: Case, **options: Any) -> Adapted:
    return Adapted(case.kind, case.sharing, case.family, **options)


class Made(NamedTuple):
    """An adapter with its output before it got values of its own; not to be changed by a test."""

    adapted: Adapted
    untrained: Tensor


@cache
def made(case: Case) -> Made:
    adapted = adapted_as(case)
    with torch.no_grad():
        untrained = adapted.output()
    fill(adapted.model)
    return Made(adapted, untrained)


@cache
def base_output(kind: str) -> Tensor:
    with torch.no_grad():
        return output_of(make_base(kind).model, kind)


# ---- what an adapter has to be ----------------------------------------------------------------


def types_of(adapted: Adapted) -> Iterator[Type]:
    config = adapted.config
    of_kind = KINDS[adapted.kind].types if adapted.plan.targets else []
    for (layers, *sizes), name in zip(of_kind, adapted.plan.module_types, strict=True):
        groups = adapted.plan.groups_of(name)
        ranks = {
            "layer": [group.r for group in groups for _ in group.layers],
            "interval": [group.r for group in groups],
            "type": [max(group.r for group in groups)],
        }
        assert len(ranks["layer"]) == layers
        a, b = sum(ranks[config.a_scope]), sum(ranks[config.b_scope])
        yield Type(*sizes, layers, ranks["interval"], a, b, sum(ranks["layer"]))


def depths_of(plan: SharingPlan) -> list[list[Target]]:
    """The targets of each layer of each stack: of what is called alike up to the layer's number."""
    found: dict[str, list[Target]] = {}
    for target in plan.targets:
        before, number, _ = re.split(r"\.(\d+)\.", target.path, maxsplit=1)
        assert int(number) == target.layer
        found.setdefault(f"{before}.{number}", []).append(target)
    return list(found.values())


def beside_types(adapted: Adapted) -> int:
    """Trainable parameters that belong to no module type: of BSLoRA, 4 ranks of a layer's largest
    sizes and 16 of the model's.
    """
    if adapted.config.family != "bslora":
        return 0
    held = [*((4, targets) for targets in depths_of(adapted.plan)), (16, adapted.plan.targets)]
    return sum(
        r * (max(t.in_features for t in targets) + max(t.out_features for t in targets))
        for r, targets in held
    )


def expected_sharers(adapted: Adapted) -> set[tuple[str, frozenset[str]]]:
    """From the groups alone: see :func:`sharers`."""
    config, plan = adapted.config, adapted.plan
    scopes = {"a": config.a_scope, "b": config.b_scope}
    paths = {(t.module_type, t.layer): t.path for t in plan.targets}
    groups = [[paths[g.module_type, layer] for layer in g.layers] for g in plan.groups]
    served = {
        "layer": [[path] for path in paths.values()],
        "interval": groups,
        "type": [[p for (t, _), p in paths.items() if t == name] for name in plan.module_types],
        "depth": [[t.path for t in targets] for targets in depths_of(plan)],
        "model": [list(paths.values())] if paths else [],
    }
    return {
        (tensor, frozenset(owners))
        for tensor, scope in TENSORS[config.family].items()
        for owners in served[scopes.get(scope, scope)]
    }


def aliases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every name under which a trained tensor is reached → the tensor, whole where it is sliced."""
    names = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Sliced):
            names[f"{name}.weight"] = module.whole.weight
    return {name: parameter for name, parameter in names.items() if parameter.requires_grad}


def sharers(adapted: Any, plan: SharingPlan) -> set[tuple[str, frozenset[str]]]:
    """Of each trained tensor of the adapter: its name in PEFT's layer, and the targets it serves.

    As found in the model, by the identity of tensors.
    """
    found: dict[int, tuple[str, set[str]]] = {}
    for name, parameter in aliases(adapted).items():
        path = next((t.path for t in plan.targets if f".{t.path}." in name), None)
        if path is not None:
            slot, _, *own = name.partition(f"{path}.")[2].removesuffix(".weight").split(".")
            attribute = ".".join([slot, *own])
            assert found.setdefault(id(parameter), (attribute, set()))[0] == attribute
            found[id(parameter)][1].add(path)
    return {(attribute, frozenset(paths)) for attribute, paths in found.values()}


def require_tied(model: Any, adapted: Adapted) -> None:
    """Each trained tensor serves the targets it should, and shares its memory with no other."""
    expected = expected_sharers(adapted)
    assert sharers(model, adapted.plan) == expected
    tensors = {id(p): p.data_ptr() for n, p in aliases(model).items() if not is_head(n, model)}
    assert len(set(tensors.values())) == len(tensors)
    if expected:
        assert len(tensors) == len(expected)


# ---- comparing --------------------------------------------------------------------------------


def steps(adapted: Adapted, model: Any, count: int, rate: float = 1e-2) -> list[float]:
    """A plain loop of AdamW, B at the rate of LoRA+ and GoRA; returns the loss before each step."""
    faster = "lora_B" if adapted.config.family in ("lora_plus", "gora") else "none"
    groups = [
        {"params": [parameter], "lr": rate * (16.0 if faster in name else 1.0)}
        for name, parameter in trainable_parameters(model).items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses = []
    for _ in range(count):
        loss = loss_of(model, adapted.kind)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def require_near(output: Tensor, expected: Tensor, relative: float) -> None:
    """Within this relative distance; exactly equal at 0."""
    assert (output - expected).norm() <= relative * expected.norm()
