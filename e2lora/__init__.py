"""Decide how to share and size LoRA adapters."""

from importlib import import_module as _import_module

_PLACES = {
    "AdapterConfig": "config.AdapterConfig",
    "PlanConfig": "config.PlanConfig",
    "SharingPlan": "plan.SharingPlan",
    "adapt": "adapters.adapt",
    "build_plan": "plan.build_plan",
    "find_targets": "targets.find_targets",
    "load": "adapters.storage.load_adapter",
    "save": "adapters.storage.save",
}
"""What users of PEFT need → where it is; imported, and torch with it, when it is asked for."""


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].rpartition(".")
    return getattr(_import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
