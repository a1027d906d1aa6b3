"""The configuration of an adapter: what it refuses, what it is called, its way through JSON."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from e2lora.config import (
    FAMILY_NAMES,
    PRESETS,
    AdapterConfig,
    BsLoraOptions,
    GoraOptions,
    IncreLoraOptions,
    LoraGaOptions,
    LoraPlusOptions,
    LoriOptions,
    PlanConfig,
    RaLoraOptions,
    TrialConfig,
    system_name,
)
from tests.small import small_trial


def adapter(family: str = "lora", **options: Any) -> AdapterConfig:
    names = () if family == "full" else ("query",)
    return AdapterConfig(family=family, target_modules=names, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_has_a_name_and_goes_through_json(family: str) -> None:
    config = adapter(family)
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config
    assert config.display_name.startswith(FAMILY_NAMES[family])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lori": LoriOptions(keep=0.5)}, r"`lori`.*family 'lori' only.*got family='lora'"),
        ({"family": "lori", "lori": LoriOptions(keep=0.5)}, r"no effect.*lori\.keep"),
        ({"projection_seed": 3}, r"no effect.*projection_seed has none with family='lora'"),
        (
            {"family": "lora_ga", "lora_ga": LoraGaOptions(scale="unit", stable_gamma=2.0)},
            r"no effect.*stable_gamma",
        ),
        ({"init_lora_weights": "loftq"}, r"default, gaussian.*got 'loftq'"),
        ({"init_lora_weights": "pissa_niter_0"}, r"got 'pissa_niter_0'"),
        ({"init_lora_weights": "pissa_niter"}, r"got 'pissa_niter'"),
        ({"family": "full", "target_modules": ("query",)}, r"full fine-tuning has none.*Remove"),
        ({"target_modules": ()}, r"got family='lora' and \[\]\. Name some"),
        ({"family": "loara"}, r"Input should be 'lora'"),
        ({"rank": 3}, r"rank"),
    ],
)
def test_what_would_train_something_else_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdapterConfig(**{"target_modules": ("query",), **options})


def test_projection_seed_is_the_trials_unless_it_is_given() -> None:
    assert adapter("vera").seeded(7).projection_seed == 7
    assert adapter("vera", projection_seed=3).seeded(7).projection_seed == 3


NAMES = {
    "LoRA": ({}, adapter()),
    "LoRA (pissa)": ({}, adapter(init_lora_weights="pissa")),
    "LoRA (rsLoRA)": ({"use_rslora": True}, adapter()),
    "ShareLoRA-A": ({}, adapter(a_scope="type")),
    "ShareLoRA-B": ({}, adapter(b_scope="type")),
    "ShareLoRA-AB": ({}, adapter(a_scope="type", b_scope="type")),
    "all-shared": ({"topology": "all"}, adapter()),
    "E²LoRA": ({"topology": "e2"}, adapter()),
    "E²LoRA (A per layer)": ({"topology": "e2"}, adapter(a_scope="layer")),
    "E²LoRA as published": (PRESETS["e2_published"], adapter()),
    "E²ShareLoRA": ({"topology": "e2"}, adapter(a_scope="type")),
    "E²ShareLoRA-B": ({"topology": "e2"}, adapter(b_scope="type")),
    "LSS only": (PRESETS["lss_only"], adapter()),
    "LSS only + shared A": (PRESETS["lss_only"], adapter(a_scope="type")),
    "LSS only AdaLoRA": (PRESETS["lss_only"], adapter("adalora")),
    "GoRA": ({}, adapter("gora")),
    "LSS only GoRA (gamma 0.1)": (
        PRESETS["lss_only"],
        adapter("gora", gora=GoraOptions(gamma=0.1)),
    ),
    "IncreLoRA": ({}, adapter("increlora", increlora=IncreLoraOptions(tinit=3, delta_t=2))),
    "HRA only": (PRESETS["hra_only"], adapter()),
    "HRA only DoRA": (PRESETS["hra_only"], adapter("dora")),
    "DoRA": ({}, adapter("dora")),
    "DoRA + shared A": ({}, adapter("dora", a_scope="type")),
    "E²DoRA": ({"topology": "e2"}, adapter("dora")),
    "blocks(2) VeRA": ({"topology": "blocks", "block_size": 2}, adapter("vera")),
    "E²VeRA": ({"topology": "e2"}, adapter("vera")),
    "LoRA+": ({}, adapter("lora_plus")),
    "LoRA+ (lr_ratio 4.0)": ({}, adapter("lora_plus", lora_plus=LoraPlusOptions(lr_ratio=4))),
    "LoRA-FA": ({}, adapter("lora_fa")),
    "LoRI-D": ({}, adapter("lori")),
    "LoRI-S": ({}, adapter("lori", lori=LoriOptions(mask_after=9))),
    "E²LoRI-S (keep 0.2)": (
        {"topology": "e2"},
        adapter("lori", lori=LoriOptions(mask_after=9, keep=0.2)),
    ),
    "BSLoRA": ({}, adapter("bslora")),
    "E²BSLoRA (inter_r 8, shapes gate)": (
        {"topology": "e2"},
        adapter("bslora", bslora=BsLoraOptions(inter_r=8, shapes="gate")),
    ),
    "LSS only RaLoRA": (PRESETS["lss_only"], adapter("ralora")),
    "RaLoRA (max_blocks 4)": ({}, adapter("ralora", ralora=RaLoraOptions(max_blocks=4))),
    "FFT": ({}, adapter("full")),
}


@pytest.mark.parametrize("name", NAMES)
def test_systems_are_called_as_the_field_calls_them(name: str) -> None:
    plan, config = NAMES[name]
    assert system_name(PlanConfig(**plan), config) == name


def test_full_fine_tuning_is_named_without_a_rank() -> None:
    trial = small_trial()
    assert trial.label == "LoRA r=4"
    full = TrialConfig(**{**dict(trial), "adapter": adapter("full")})
    assert full.label == "FFT"
