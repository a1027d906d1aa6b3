"""What every kind of adapter must say of itself: how it is made, counted, and what it allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from torch import Tensor

from e2lora.config import FAMILY_NAMES, AdapterConfig, PlanConfig, TrainConfig, TrialConfig
from e2lora.moments import Target
from e2lora.plan import SharingPlan
from e2lora.targets import is_transposed
from e2lora.weights import wrapped_modules

DEFAULT_NAME = "default"

Ability = Literal["merge", "peft", "portable"]
"""What may be made of an adapter: merged weights; an adapter that PEFT alone loads; plain LoRA of
one rank and α, for readers that know no more."""


@dataclass(frozen=True)
class Request:
    """What an adapter is to be made from.

    Args:
        head: modules that are trained in full beside the adapter.
        name: of the adapter inside the PEFT model.
        gradients: target path → ∂loss/∂W (out × in) of its group, for families that start from it.
        initial: tensors of :meth:`Family.initial`, to start where an earlier one started.
    """

    plan: SharingPlan
    config: AdapterConfig
    head: Sequence[str] = ()
    name: str = DEFAULT_NAME
    gradients: Mapping[str, Tensor] | None = None
    initial: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Factors:
    """What a layer's adapter adds to its weight: ``scale · b @ a`` (out × in)."""

    a: Tensor
    b: Tensor
    scale: float


class Handle:
    """What the training loop lets a family's hooks see and change: full tensors, at every stage of
    ZeRO that the family allows. Every method is collective: all workers must call it.
    """

    def gradient(self, name: str) -> Tensor:
        """Of a trainable parameter, of the whole batch, before clipping; between backward and
        step.
        """
        raise NotImplementedError

    def value(self, name: str) -> Tensor:
        """A copy of a trainable parameter in float32: of its master, where it has one."""
        raise NotImplementedError

    def assign(self, name: str, value: Tensor) -> None:
        """Set a trainable parameter, its float32 master included."""
        raise NotImplementedError

    learning_rate_scale: float = 1.0
    "of what is no head, on top of the schedule"

    def restart_optimizer(self) -> None:
        """Let the optimizer begin anew: no moments, no steps."""
        raise NotImplementedError


class Hooks:
    """What a family does inside the training loop; this one does nothing."""

    def penalty(self) -> Tensor | None:
        """Added to the mean loss of every microbatch."""
        return None

    def after_backward(self, step: int) -> None:
        """Once all gradients of step ``step`` (from 1) are there, before the optimizer's step."""

    def after_step(self, step: int) -> None:
        """After the optimizer's step ``step`` (from 1)."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the parameters."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""


class Family:
    """One kind of adapter. A subclass declares what it allows; what it doesn't is refused.

    A reason is a sentence for users: why not, and what to do instead.
    """

    key: ClassVar[str]
    "the word for it in a configuration"
    initialisations: ClassVar[Sequence[str]] = ("default",)
    scopes: ClassVar[Sequence[str]] = ("interval",)
    "of A and B"
    no_allocation: ClassVar[str] = ""
    "why ranks can't be allocated by gradients, where they can't"
    one_rank: ClassVar[str] = ""
    "why all groups must have the same rank, where they must"
    lacks: ClassVar[Mapping[Ability, str]] = {}
    "why not, of what can't be made of it"
    unread_by_peft: ClassVar[tuple[str, ...]] = ()
    "ends of names in a state dict that PEFT alone has no use for"
    shared_anyway: ClassVar[str] = ""
    "who share tensors of it under every plan, in words"
    zero_stages: ClassVar[Sequence[int]] = (0, 1, 2, 3)
    why_not_other_stages: ClassVar[str] = ""
    needs_gradients: ClassVar[bool] = False
    "starts from the gradients of its targets' weights"
    count_is_limit: ClassVar[bool] = False
    "ranks follow from the gradients it starts from; :meth:`count` is what they never exceed"
    starts_moved: ClassVar[bool] = False
    "a fresh adapter changes the base's outputs by design"
    drift: ClassVar[float] = 0.0
    "largest relative change of a fresh adapter to the base's outputs, from rounding"

    @property
    def name(self) -> str:
        return FAMILY_NAMES[self.key]

    def left_to_the_loop(self, config: AdapterConfig) -> str:
        """What of the method only this project's training loop does; "" if nothing is."""
        return ""

    def touches_base(self, config: AdapterConfig) -> bool:
        """Whether making or training it changes base weights; they must be loaded anew after."""
        return False

    def frozen(self, adapted: Any, name: str) -> dict[str, Tensor]:
        """Tensors of the adapter that are not trained and follow from ``projection_seed``."""
        return {}

    def initial(self, adapted: Any, name: str) -> dict[str, Tensor]:
        """What a family took from the base or chose by gradients, to start there again."""
        return {}

    def require_suits(self, plan: PlanConfig, config: AdapterConfig) -> None:
        """Refuse combinations that have no meaning.

        Raises:
            ValueError: with the reason.
        """
        if self.no_allocation and plan.rank_allocation != "uniform":
            raise ValueError(
                f"{self.name} can't follow ranks allocated by gradients: {self.no_allocation}; got "
                f"allocation={plan.rank_allocation!r}. Set allocation='uniform' (with topology "
                "'e2': layer sharing only)."
            )
        for tensor in "ab":
            scope = getattr(config, f"{tensor}_scope")
            if scope not in self.scopes:
                raise ValueError(
                    f"tensors of {self.name} are shared as its groups are; got {tensor}_scope="
                    f"{scope!r}. Use one of {list(self.scopes)}, or another family."
                )
        if config.init_lora_weights.partition("_")[0] not in self.initialisations:
            raise ValueError(
                f"{self.name} can be initialised by {list(self.initialisations)}; got "
                f"init_lora_weights={config.init_lora_weights!r}. Use one of these, or another "
                "family."
            )

    def require_fits(self, plan: SharingPlan, config: AdapterConfig) -> None:
        """Refuse what only the plan shows: its groups and ranks.

        Raises:
            ValueError: with the reason.
        """
        ranks = sorted({group.r for group in plan.groups})
        if self.one_rank and len(ranks) > 1:
            raise ValueError(
                f"all groups of {self.name} must have the same rank: {self.one_rank}; this plan "
                f"has ranks {ranks}. Give all `groups` the same r, or use another family."
            )

    def require_trains(self, config: TrialConfig) -> None:
        """Refuse what training asks and the family can't do.

        Raises:
            ValueError: with the reason.
        """
        stage = config.training.zero_stage
        if stage not in self.zero_stages:
            raise ValueError(
                f"{self.name} can't be trained at ZeRO stage {stage}: {self.why_not_other_stages}. "
                f"Use zero_stage in {list(self.zero_stages)}."
            )

    def require_reaches(self, plan: SharingPlan, config: TrialConfig) -> None:
        """Refuse a training too short for what only the plan shows.

        Raises:
            ValueError: with the reason.
        """

    def count(self, plan: SharingPlan, config: AdapterConfig) -> int | None:
        """Trainable parameters, each shared tensor once; a head is not counted.

        None: all that the model has, which no plan tells.
        """
        raise NotImplementedError

    def build(self, model: Any, request: Request) -> Any:
        """Put the adapter into ``model`` in place; returns the PEFT model around it."""
        raise NotImplementedError

    def learning_rate_ratio(self, parameter_name: str, config: AdapterConfig) -> float:
        """The learning rate of a parameter over the adapter's."""
        return 1.0

    def hooks(
        self, adapted: Any, config: AdapterConfig, training: TrainConfig, handle: Handle
    ) -> Hooks:
        return Hooks()

    def pack(self, tensors: dict[str, Tensor], adapted: Any, name: str) -> dict[str, Tensor]:
        """The trained tensors of adapter ``name`` as they are stored: where that can be smaller
        than they are, and with what else training goes on from.

        A stored name is the parameter's in the base model, without the adapter's own.
        """
        return tensors

    def unpack(
        self,
        stored: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        adapted: Any,
        name: str,
    ) -> dict[str, Tensor]:
        """The inverse of :meth:`pack`: tensors of these shapes. The rest goes into ``adapted``."""
        return dict(stored)

    def factors(self, layer: Any, name: str) -> Factors:
        """What the adapter ``name`` of an adapted layer adds, for families that are portable."""
        raise NotImplementedError


def inject(model: Any, plan: SharingPlan, peft_config: Any, name: str) -> Any:
    """Let PEFT put its layers on exactly the plan's targets; returns the PEFT model."""
    from peft import PeftModel, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel):
        model.add_adapter(name, peft_config)
        model.set_adapter(name)
        adapted = model
    else:
        adapted = get_peft_model(model, peft_config, name)
    inner = adapted.get_base_model()
    injected = {
        path
        for path, module in inner.named_modules()
        if isinstance(module, BaseTunerLayer)
        and any(name in getattr(module, slot) for slot in module.adapter_layer_names)
    }
    planned = {target.path for target in plan.targets}
    assert injected == planned, f"PEFT adapted {injected ^ planned} unlike the plan"
    return adapted


def common_options(model: Any, request: Request) -> dict[str, Any]:
    """Options that all of PEFT's configurations take."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_classifier = type(inner).__name__.endswith("ForSequenceClassification")
    # PEFT trains these of a SEQ_CLS model whether it is told to or not
    trains_classifier = bool({"classifier", "score"} & set(request.head))
    paths = [target.path for target in request.plan.targets]
    return {
        "task_type": "SEQ_CLS" if is_classifier and trains_classifier else None,
        "target_modules": paths,
        "modules_to_save": list(request.head) or None,
        "fan_in_fan_out": any(is_transposed(base_layer(inner, path)) for path in paths),
    }


def require_gradients(family: str, request: Request) -> None:
    """A gradient of every target, for a family that starts from them.

    Raises:
        ValueError: with what lacks.
    """
    if request.gradients is None:
        raise ValueError(
            f"{family} starts from gradients, and none were given. Pass `gradients`, as "
            "`e2lora.profile.measure_group_gradients` gives them, or load a saved adapter."
        )
    paths = [target.path for target in request.plan.targets]
    lacking = [path for path in paths if path not in request.gradients]
    if lacking:
        raise ValueError(
            f"{family} starts from a gradient of every target of its plan; `gradients` lack "
            f"{len(lacking)} of {len(paths)}, such as {lacking[:3]}. Measure them by the same plan."
        )


def put_back(model: Any) -> None:
    """Take out what PEFT has put around a model's modules, where it failed half-way."""
    for path, below in sorted(wrapped_modules(model).items(), reverse=True):
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, getattr(model.get_submodule(path), below))
    vars(model).pop("peft_config", None)  # or PEFT takes the model for an adapted one


def base_layer(model: Any, path: str) -> Any:
    """The linear module of a target, below what PEFT put around it."""
    module = model.get_submodule(path)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def layers_of(adapted: Any, plan: SharingPlan) -> dict[str, Any]:
    """Target path → PEFT's layer there."""
    inner = adapted.get_base_model()
    return {target.path: inner.get_submodule(target.path) for target in plan.targets}


def first_targets(plan: SharingPlan) -> dict[str, Target]:
    """Target path → the first target of its group."""
    first: dict[Any, Target] = {}
    by_path = {target.path: target for target in plan.targets}
    return {
        path: first.setdefault(group, by_path[path])
        for path, group in plan.group_of_target().items()
    }


def share_first(
    layers: Mapping[str, Any], plan: SharingPlan, name: str, slots: Sequence[str] | None = None
) -> None:
    """Give each of PEFT's layers the trained tensors that the first of its group has.

    For layers that hold them as parameters, one per adapter in each of ``slots``: by default
    ``adapter_layer_names``.
    """
    for path, first in first_targets(plan).items():
        for slot in slots or layers[path].adapter_layer_names:
            getattr(layers[path], slot)[name] = getattr(layers[first.path], slot)[name]


def require_same_projections(
    family: str, model: Any, needed: Mapping[str, tuple[int, ...]]
) -> None:
    """All adapters of a family in a model use one set of frozen projections, whose numbers depend
    on its shape.

    Args:
        needed: PEFT's name of a projection → the shape that a further adapter needs.

    Raises:
        ValueError: the model has one of another shape.
    """
    for slot, shape in needed.items():
        present = getattr(getattr(model, "base_model", None), slot, None)
        for projection in present.values() if present else ():
            if tuple(projection.shape) != shape:
                raise ValueError(
                    f"adapters of {family} in one model use one set of projections, so their "
                    "largest ranks and largest weights must agree; the model has a "
                    f"{slot} of {tuple(projection.shape)}, this adapter needs {shape}. Put it into "
                    "a model of its own."
                )


def take_back_any_head(adapted: Any) -> None:
    """Let ``unload`` and ``merge_and_unload`` work with a head of several layers.

    PEFT's tuners other than LoRA's (0.21) ask each module that they put back for its ``weight``.
    """
    tuner = adapted.base_model
    if not isinstance(tuner, _TakesBackAnyHead):
        tuner.__class__ = _taking_back_any_head(tuner.__class__)


class _TakesBackAnyHead:
    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if hasattr(new_module, "weight"):
            super()._replace_module(parent, child_name, new_module, child)  # type: ignore[misc]
        else:
            setattr(parent, child_name, new_module)


@cache
def _taking_back_any_head(tuner_class: type) -> type:
    return type(tuner_class.__name__, (_TakesBackAnyHead, tuner_class), {})
