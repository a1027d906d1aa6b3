"""Every rule of a trial's training options, and the DeepSpeed dictionary that follows from them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from e2lora.config import EarlyStopping, GroupSpec, TrainConfig
from e2lora.config.deepspeed import OPEN, OURS, merged
from e2lora.training.engine import require_known_to_deepspeed


def training(**options: Any) -> TrainConfig:
    return TrainConfig(**{"max_steps": 10, "learning_rate": 1e-3, **options})


# ---- rules ------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_steps": None}, r"one of `max_steps` and `num_epochs`; got None and None"),
    ({"num_epochs": 2.0}, r"one of `max_steps` and `num_epochs`; got 10 and 2\.0"),
    ({"max_steps": 0}, "greater than 0"),
    ({"num_epochs": 0.0, "max_steps": None}, "greater than 0"),
    ({"learning_rate": 0.0}, "greater than 0"),
    ({"learning_rate": float("nan")}, "finite"),
    ({"gradient_accumulation_steps": 0}, "at least 1, or 'auto'; got 0"),
    ({"gradient_accumulation_steps": -2}, "at least 1, or 'auto'; got -2"),
    ({"gradient_accumulation_steps": "max"}, "'auto'"),
    ({"gradient_accumulation_steps": 3}, r"multiple of num_workers x.*got 16 and 1 x 3"),
    ({"num_workers": 3}, r"got 16 and 3 x 1"),
    (
        {"num_workers": 3, "gradient_accumulation_steps": "auto"},
        r"got 16 and 3 x 1",
    ),
    ({"warmup_steps": 2, "warmup_ratio": 0.1}, r"one of `warmup_steps` and `warmup_ratio`; got 2"),
    ({"warmup_steps": 10}, r"`warmup_steps` \(10\) must be below `max_steps` \(10\)"),
    ({"warmup_ratio": 0.95}, r"`warmup_steps` \(10\) must be below `max_steps` \(10\)"),
    ({"warmup_ratio": 1.0}, "less than 1"),
    ({"precision": "bf16", "zero_stage": 0}, "bf16 needs float32 master weights.*zero_stage=0"),
    ({"precision": "fp16", "zero_stage": 0}, "fp16 needs float32 master weights.*zero_stage=0"),
    ({"precision": "fp8"}, "'fp32', 'bf16' or 'fp16'"),
    ({"zero_stage": 4}, "0, 1, 2 or 3"),
    ({"offload_optimizer": True, "zero_stage": 0}, "ZeRO does; got zero_stage=0"),
    ({"offload_parameters": True, "zero_stage": 2}, "partitioned; got zero_stage=2"),
    ({"torch_compile": True, "zero_stage": 3}, "can't see how ZeRO stage 3 gathers"),
    ({"early_stopping": EarlyStopping()}, "got eval_every=None"),
    ({"early_stopping": {"metric": "accuracy"}}, "metric='accuracy' alone. Add `direction`"),
    ({"save_total_limit": 0}, "greater than 0"),
    ({"activation_checkpointing": "always"}, "'non_reentrant'"),
    ({"learning_rat": 1e-3}, "Extra inputs"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=lambda value: str(value)[:50])
def test_rule_is_told_with_the_value_that_breaks_it(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){said}"):
        training(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 0},
        {"precision": "fp16", "zero_stage": 3, "offload_parameters": True},
        {"precision": "bf16", "zero_stage": 1, "offload_optimizer": True, "torch_compile": True},
        {"early_stopping": EarlyStopping(), "eval_every": 2},
        {"warmup_steps": 9},
        {"warmup_ratio": 0.9},
        {"num_workers": 4, "gradient_accumulation_steps": 4},
    ],
    ids=str,
)
def test_what_no_rule_forbids_is_taken(options: dict[str, Any]) -> None:
    assert training(**options).model_dump(include=set(options)) == {
        key: value.model_dump() if isinstance(value, EarlyStopping) else value
        for key, value in options.items()
    }


def test_configuration_survives_json() -> None:
    config = training(
        max_steps=None,
        num_epochs=1.5,
        warmup_ratio=0.1,
        gradient_accumulation_steps="auto",
        eval_every=5,
        early_stopping=EarlyStopping(metric="accuracy", direction="maximize", min_delta=0.01),
        precision="fp16",
        zero_stage=3,
        offload_parameters=True,
        deepspeed={"zero_optimization": {"stage3_prefetch_bucket_size": 1000}, "dump_state": True},
    )
    again = TrainConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.fingerprint() == config.fingerprint()


# ---- steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    [
        (1, 96, 16, 6),
        (1, 97, 16, 7),
        (2, 100, 16, 13),
        (0.5, 100, 16, 4),
        (1, 3, 16, 1),
        (0.07, 100, 1, 7),
    ],
)
def test_epochs_become_steps_that_cover_them(
    epochs: float, rows: int, batch: int, steps: int
) -> None:
    config = training(max_steps=None, num_epochs=epochs, global_batch_size=batch)
    known = config.for_rows(rows)
    assert (known.max_steps, known.num_epochs) == (steps, None)
    assert known.num_steps == steps
    assert (steps - 1) * batch < epochs * rows or steps == 1


def test_steps_that_are_given_stay() -> None:
    config = training()
    assert config.for_rows(5) is config


def test_epochs_that_end_within_warmup_are_refused_once_the_rows_are_known() -> None:
    config = training(max_steps=None, num_epochs=1, warmup_steps=6)
    with pytest.raises(ValidationError, match=r"`warmup_steps` \(6\).*`max_steps` \(6\)"):
        config.for_rows(96)


def test_what_is_not_known_yet_is_not_made_up() -> None:
    with pytest.raises(ValueError, match="for_rows"):
        _ = training(max_steps=None, num_epochs=1).num_steps
    unknown = training(gradient_accumulation_steps="auto")
    for read in (lambda: unknown.accumulation, lambda: unknown.micro_batch_size):
        with pytest.raises(ValueError, match="found before training"):
            read()
    with pytest.raises(ValueError, match="found before training"):
        unknown.deepspeed_config()


@pytest.mark.parametrize(
    ("ratio", "steps", "warm"), [(0.1, 100, 10), (0.1, 101, 11), (0.0, 9, 0), (0.07, 100, 7)]
)
def test_share_of_warmup_is_rounded_up(ratio: float, steps: int, warm: int) -> None:
    assert training(max_steps=steps, warmup_ratio=ratio).num_warmup_steps == warm


def test_share_of_warmup_is_of_the_steps_that_epochs_become() -> None:
    config = training(max_steps=None, num_epochs=10, warmup_ratio=0.25)
    assert config.for_rows(160).num_warmup_steps == 25


@pytest.mark.parametrize(
    ("direction", "value", "better"),
    [("minimize", 0.85, True), ("minimize", 0.95, False), ("maximize", 1.15, True)],
)
def test_improvement_is_more_than_min_delta(direction: Any, value: float, better: bool) -> None:
    stopping = EarlyStopping(direction=direction, min_delta=0.1)
    assert stopping.is_better(value, best=1.0) is better


# ---- DeepSpeed's dictionary -------------------------------------------------------------------


def test_dictionary_follows_from_the_options() -> None:
    config = training(
        num_workers=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0.5,
        precision="bf16",
        zero_stage=3,
        offload_optimizer=True,
        offload_parameters=True,
    ).deepspeed_config()
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5
    assert (config["bf16"], config["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert config["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }


def test_users_keys_are_added_beside_ours() -> None:
    extra = {
        "zero_optimization": {"reduce_bucket_size": 1000, "offload_optimizer": {"ratio": 0.5}},
        "fp16": {"initial_scale_power": 8},
        "wall_clock_breakdown": True,
    }
    config = training(
        precision="fp16", zero_stage=2, offload_optimizer=True, deepspeed=extra
    ).deepspeed_config()
    assert config["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "ratio": 0.5},
        "reduce_bucket_size": 1000,
    }
    assert config["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert config["wall_clock_breakdown"] is True


def test_repeating_what_is_derived_contradicts_nothing() -> None:
    extra = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}
    assert training(deepspeed=extra).deepspeed_config() == training().deepspeed_config()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage.*`zero_stage` \(here: 1"),
        ({"gradient_clipping": 2.0}, r"gradient_clipping.*`max_grad_norm` \(here: 1\.0\)"),
        ({"gradient_accumulation_steps": 2}, r"`gradient_accumulation_steps` \(here: 1\), got 2"),
        ({"train_batch_size": 64}, r"train_batch_size is decided by `global_batch_size`"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled is decided by `precision`"),
        ({"optimizer": {"type": "SGD"}}, r"optimizer is decided by `learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler is decided by `schedule"),
        ({"activation_checkpointing": {}}, r"decided by `activation_checkpointing`"),
        ({"compile": {"deepcompile": True}}, r"compile is decided by `torch_compile`"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer\.device is decided by `offload_optimizer`.*'nvme'",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            r"offload_param\.device is decided by `offload_parameters`",
        ),
        (
            {"zero_optimization": {"cpu_offload": True}},
            r"cpu_offload is decided by `offload_optimizer`",
        ),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, r"grads is decided by `precision`"),
        ({"zero_optimisation": {"stage": 1}}, r"'zero_optimisation' is none of them"),
        ({"curriculum_learning": {"enabled": True}}, r"'curriculum_learning' is none of them"),
        ({"zero_optimization": 1}, r"zero_optimization is a dictionary, got 1"),
        ({"steps_per_print": {"every": 3}}, r"steps_per_print is no dictionary"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_key_that_contradicts_or_is_not_open_is_refused(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){said}"):
        training(deepspeed=extra)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"zero_optimization": {"overlap_com": False}}, r"\.overlap_com is .*False"),
        ({"zero_optimization": {"overlap_comm": "maybe"}}, r"overlap_comm .* boolean.*'maybe'"),
        ({"bf16": {"enable": True}}, r"bf16\.enable is refused"),
    ],
    ids=str,
)
def test_what_deepspeed_itself_would_refuse_is_refused_before_it_starts(
    extra: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        require_known_to_deepspeed(training(deepspeed=extra))
    known = {"zero_optimization": {"overlap_comm": False, "stage3_prefetch_bucket_size": 1000}}
    require_known_to_deepspeed(training(deepspeed=known, zero_stage=3))


def test_each_of_our_keys_names_options_that_exist() -> None:
    for options in OURS.values():
        assert set(options.split(", ")) <= TrainConfig.model_fields.keys()
    assert not OPEN & OURS.keys()


def test_merging_changes_neither_side() -> None:
    derived: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    extra: dict[str, Any] = {"zero_optimization": {"overlap_comm": True}}
    merged(derived, extra)
    assert derived == {"zero_optimization": {"stage": 1}}
    assert extra == {"zero_optimization": {"overlap_comm": True}}


# ---- groups -----------------------------------------------------------------------------------


def test_groups_of_trials_differ_in_what_a_process_must_be_and_in_nothing_else() -> None:
    spec = GroupSpec.of(training(zero_stage=3, offload_parameters=True, precision="bf16"))
    assert spec == GroupSpec.of(
        training(
            zero_stage=3,
            offload_parameters=True,
            precision="bf16",
            max_steps=99,
            learning_rate=1.0,
            gradient_accumulation_steps="auto",
        )
    )
    for other in ({"zero_stage": 2}, {"torch_compile": True}, {"num_workers": 2}):
        assert GroupSpec.of(training(**other)) != GroupSpec.of(training())
