"""The targets of a model: which weights can be adapted, and what is known of them.

Targets are found by structure: modules below a numbered entry of an ``nn.ModuleList`` that map
x (…, in) to y (…, out) with one matrix of their own. No list of model names is kept for that. Only
where the rows of a fused projection make q, k and v can't be seen from shapes: it is looked up in
``LAYOUTS``, and a projection that isn't there has no parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from e2lora.moments import Target
from e2lora.partitioned import shape_of
from e2lora.weights import wrapped_modules


def find_targets(model: nn.Module, target_modules: Sequence[str] | str) -> tuple[Target, ...]:
    """Every linear module in a numbered layer whose path ends in one of ``target_modules``.

    Those of a PEFT model are found below its adapters, by their paths in the bare model.

    Raises:
        ValueError: a name that matches nothing; the message lists what could be named.
    """
    if isinstance(target_modules, str):
        target_modules = (target_modules,)
    candidates = list(_linears_in_layers(model))
    found: dict[str, Target] = {}
    for name in target_modules:
        matches = [c for c in candidates if c.path == name or c.path.endswith(f".{name}")]
        if not matches:
            names = sorted({candidate.path.rpartition(".")[2] for candidate in candidates})
            known = ", ".join(names) or "none"
            raise ValueError(
                "each of `target_modules` must end the path of a linear module inside the "
                f"numbered layers; {name!r} matches none. This model has: {known}."
            )
        found |= {match.path: match for match in matches}
    return _one_shape_per_type([c for c in candidates if c.path in found])


def layers_without(model: nn.Module, targets: Sequence[Target]) -> dict[str, tuple[int, ...]]:
    """Per module type, the layers of its stack that have no such module; where there are any.

    In a hybrid model, say of attention and state-space layers, these are skipped: a plan shares
    among the other layers. A layer that has the module in another shape is of another type and not
    skipped.
    """
    skipped = {}
    for target in {t.module_type: t for t in targets}.values():
        start = target.module_type.index("*")
        before, after = target.path[:start], target.path[start + len(str(target.layer)) :]
        stack: Any = model.get_submodule(before.rstrip("."))
        lacking = [i for i in range(len(stack)) if not _is_linear(model, f"{before}{i}{after}")]
        if lacking:
            skipped[target.module_type] = tuple(lacking)
    return skipped


def _is_linear(model: nn.Module, path: str) -> bool:
    try:
        return linear_shape(model.get_submodule(path)) is not None
    except AttributeError:
        return False


# ---- what is linear ---------------------------------------------------------------------------


class Shape(NamedTuple):
    in_features: int
    out_features: int


def linear_shape(module: nn.Module) -> Shape | None:
    """The sizes of a module that maps x to y with one matrix, whatever form it is stored in.

    These are ``nn.Linear`` (bitsandbytes' and torchao's are such), transformers' ``Conv1D``, and
    quantised layers of other classes (GPTQ, AWQ, HQQ, AQLM, …), known by their sizes. None for
    anything else, as the layer of an adapter that is wrapped around a linear one.
    """
    if hasattr(module, "base_layer"):  # PEFT's layer of RandLoRA is an nn.Linear all the same
        return None
    if isinstance(module, nn.Linear):
        return Shape(module.in_features, module.out_features)
    if is_transposed(module):
        return Shape(int(module.nx), int(module.nf))  # type: ignore[arg-type]
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        sizes = [getattr(module, name, None) for name in names]
        if all(type(size) is int and size > 0 for size in sizes):
            return Shape(*sizes) if _is_one_matrix(module) else None  # type: ignore[arg-type]
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight lies as (in × out): only that of transformers' ``Conv1D`` (GPT-2) does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_one_matrix(module: nn.Module) -> bool:
    """Whether a module that names its sizes is linear, and not a container or a set of experts.

    A container's matrices belong to its children (the children of a linear layer hold scales, if
    anything); experts are called with more than x.
    """
    own = list(chain(module.parameters(recurse=False), module.buffers(recurse=False)))
    tensors = chain(module.parameters(), module.buffers())
    matrices = [tensor for tensor in tensors if len(shape_of(tensor)) > 1]
    if not own or not {id(matrix) for matrix in matrices} <= {id(tensor) for tensor in own}:
        return False
    arguments = inspect.signature(module.forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [a for a in arguments if a.default is a.empty and a.kind not in variadic]
    return len(needed) <= 1


def _modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """By path; of a PEFT model those below its layers, as in the bare model."""
    if not hasattr(model, "get_base_model"):
        yield from model.named_modules()
        return
    inner = model.get_base_model()
    wrapped = wrapped_modules(inner)
    for path, module in inner.named_modules():
        parts = path.split(".")
        if not any(".".join(parts[:depth]) in wrapped for depth in range(1, len(parts))):
            yield path, getattr(module, wrapped[path]) if path in wrapped else module


def _linears_in_layers(model: Any) -> Iterator[Target]:
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    for path, module in _modules(model):
        shape = linear_shape(module)
        if shape is None:
            continue
        parts = path.split(".")
        parents = [inner.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        if isinstance(parents[-1], nn.MultiheadAttention):
            continue  # which reads the weight of its projection and never calls it
        numbered = (
            depth
            for depth, (part, parent) in enumerate(zip(parts, parents, strict=True))
            if part.isdigit() and isinstance(parent, nn.ModuleList)
        )
        depth = next(numbered, None)
        if depth is None:
            continue
        yield Target(
            path=path,
            module_type=".".join([*parts[:depth], "*", *parts[depth + 1 :]]),
            layer=int(parts[depth]),
            in_features=shape.in_features,
            out_features=shape.out_features,
        )


def _one_shape_per_type(targets: Sequence[Target]) -> tuple[Target, ...]:
    """Split a module type whose layers differ in shape: only equal shapes can share."""
    shapes: dict[str, set[tuple[int, int]]] = {}
    for t in targets:
        shapes.setdefault(t.module_type, set()).add((t.out_features, t.in_features))
    return tuple(
        t
        if len(shapes[t.module_type]) == 1
        else t.model_copy(
            update={"module_type": f"{t.module_type} ({t.out_features}x{t.in_features})"}
        )
        for t in targets
    )


# ---- fused projections ------------------------------------------------------------------------


class Layout(NamedTuple):
    """Rows of a fused projection: a pattern of consecutive parts, ``repeats`` times over.

    ``shares`` are the parts in order, each with its size in a common unit (a head, or any).
    """

    repeats: int
    shares: dict[str, int]

    def rows(self, out_features: int) -> dict[str, tuple[int, ...]]:
        """The numbers of the rows that make each part.

        >>> Layout(2, {"q": 2, "k": 1, "v": 1}).rows(8)
        {'q': (0, 1, 4, 5), 'k': (2, 6), 'v': (3, 7)}
        """
        labels = [label for label, share in self.shares.items() for _ in range(share)]
        unit, rest = divmod(out_features, self.repeats * len(labels))
        assert rest == 0, f"{out_features} rows don't divide into {self}"
        return {
            part: tuple(i for i in range(out_features) if labels[i // unit % len(labels)] == part)
            for part in self.shares
        }


def fused_parts(
    model: nn.Module, targets: Sequence[Target]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Path of each fused projection → which rows of its (out × in) weight are "q", "k" and "v".

    A projection whose layout isn't known has no entry. PEFT adapts the whole as one module.
    """
    parts = {}
    for target in targets:
        parent_path, _, name = target.path.rpartition(".")
        parent = model.get_submodule(parent_path)
        layout = LAYOUTS.get(f"{type(parent).__name__}.{name}")
        # code of another origin may use the same name for another layout
        if layout and type(parent).__module__.startswith("transformers.models."):
            parts[target.path] = layout(parent).rows(target.out_features)
    return parts


def _num_heads(attention: Any) -> int:
    own = (getattr(attention, name, None) for name in ("num_heads", "num_attention_heads"))
    return next((heads for heads in own if heads), None) or attention.config.num_attention_heads


def _stacked(attention: Any) -> Layout:
    return Layout(1, {"q": 1, "k": 1, "v": 1})


def _stacked_or_crossed(attention: Any) -> Layout:
    return Layout(1, {"k": 1, "v": 1}) if attention.is_cross_attention else _stacked(attention)


def _by_head(attention: Any) -> Layout:
    return Layout(_num_heads(attention), {"q": 1, "k": 1, "v": 1})


def _grouped(attention: Any) -> Layout:
    kv_heads = attention.num_key_value_heads
    return Layout(1, {"q": _num_heads(attention), "k": kv_heads, "v": kv_heads})


def _gpt_bigcode(attention: Any) -> Layout:
    if attention.multi_query:
        return Layout(1, {"q": attention.num_heads, "k": 1, "v": 1})
    return _by_head(attention)


def _falcon(attention: Any) -> Layout:
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    if attention.new_decoder_architecture:
        return Layout(kv_heads, {"q": heads // kv_heads, "k": 1, "v": 1})
    if attention.multi_query:
        return Layout(1, {"q": heads, "k": 1, "v": 1})
    return _by_head(attention)


def _codegen(attention: Any) -> Layout:
    return Layout(4, {"q": 1, "v": 1, "k": 1})  # cut in 4 for the TPUs of its time; v before k


# The class and name of a fused projection in transformers → how its forward takes it apart.
LAYOUTS: dict[str, Callable[[Any], Layout]] = {
    "Attention.c_attn": _stacked,  # the first GPT
    "GPT2Attention.c_attn": _stacked_or_crossed,
    "GPTBigCodeAttention.c_attn": _gpt_bigcode,
    "GPTNeoXAttention.query_key_value": _by_head,
    "GPTNeoXJapaneseAttention.query_key_value": _by_head,
    "BloomAttention.query_key_value": _by_head,
    "PersimmonAttention.query_key_value": _by_head,
    "FalconAttention.query_key_value": _falcon,
    "CodeGenAttention.qkv_proj": _codegen,
    "Phi3Attention.qkv_proj": _grouped,
    "MptAttention.Wqkv": _stacked,
    "DbrxAttention.Wqkv": _grouped,
    "ModernBertAttention.Wqkv": _stacked,
    "BlipAttention.qkv": _stacked,
}
