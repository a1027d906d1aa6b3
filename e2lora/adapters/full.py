"""Full fine-tuning: no adapter at all, every weight is trained. What adapters are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from e2lora.adapters.family import Ability, Family, Request
from e2lora.config import AdapterConfig, PlanConfig
from e2lora.partitioned import numel_of
from e2lora.plan import SharingPlan


class FullyTrained(nn.Module):
    """A model all of whose weights are trained, with what the project asks of a PEFT model."""

    def __init__(self, model: Any, head: Sequence[str]) -> None:
        super().__init__()
        self.model, self.head = model, tuple(head)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["model"], name)

    def get_base_model(self) -> Any:
        return self.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trained, and all."""
        sizes = {True: 0, False: 0}
        for parameter in self.parameters():
            sizes[parameter.requires_grad] += numel_of(parameter)
        return sizes[True], sum(sizes.values())

    def print_trainable_parameters(self) -> None:
        trained, everything = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trained:,} || all params: {everything:,} || "
            f"trainable%: {100 * trained / everything:.4f}"
        )

    def unload(self) -> Any:
        """The model as it is now, frozen as PEFT leaves it: its first weights are gone."""
        return self.model.requires_grad_(False)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> Any:
        """As :meth:`unload`: there is nothing to merge, so PEFT's options have no effect."""
        return self.unload()

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        self.model.save_pretrained(folder, **options)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        raise ValueError("full fine-tuning has no adapter to disable. Load the base model beside.")
        yield


class Full(Family):
    """FFT. There are no groups and no ranks: the plan is that of topology ``none``, and empty."""

    key = "full"
    lacks: ClassVar[Mapping[Ability, str]] = {
        "peft": "there is no adapter, only other weights; export them merged",
        "portable": "there is no adapter, only other weights; export them merged",
    }

    def touches_base(self, config: AdapterConfig) -> bool:
        return True

    def require_suits(self, plan: PlanConfig, config: AdapterConfig) -> None:
        super().require_suits(plan, config)
        if plan.topology != "none" or plan.needs_profile or config.lora_dropout:
            raise ValueError(
                "full fine-tuning trains every weight by itself: nothing is shared, no rank "
                f"allocated, no adapter's input dropped; got topology={plan.topology!r}, "
                f"allocation={plan.rank_allocation!r}, lora_dropout={config.lora_dropout:g}. Leave "
                "them at their defaults."
            )

    def count(self, plan: SharingPlan, config: AdapterConfig) -> None:
        """All of the model's weights: not known from a plan."""

    def build(self, model: Any, request: Request) -> FullyTrained:
        quantised = [name for name, p in model.named_parameters() if not p.is_floating_point()]
        if quantised:
            raise ValueError(
                f"full fine-tuning needs weights that can be trained; {quantised[0]} is quantised. "
                "Load the model without quantisation, or use an adapter."
            )
        return FullyTrained(model.requires_grad_(True), request.head)
