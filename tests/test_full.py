"""Full fine-tuning where a PEFT model is expected: its counts, and what unloading gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from e2lora.adapters import adapt
from tests.kinds import Adapted, fill, output_of

OPTIONS: dict[str, Any] = {"progressbar": False, "safe_merge": True, "adapter_names": ["default"]}


def test_all_parameters_are_counted_as_peft_counts(capsys: pytest.CaptureFixture[str]) -> None:
    full, lora = Adapted("bert", "own", "full"), Adapted("bert", "own")
    everything = sum(p.numel() for p in full.base.model.parameters())
    assert full.model.get_nb_trainable_parameters() == (everything, everything)
    full.model.print_trainable_parameters()
    lora.model.print_trainable_parameters()
    line, of_peft = capsys.readouterr().out.splitlines()
    assert line == (
        f"trainable params: {everything:,} || all params: {everything:,} || trainable%: 100.0000"
    )
    trained, total = lora.model.get_nb_trainable_parameters()
    assert of_peft == line.replace(f"{everything:,}", f"{trained:,}", 1).replace(
        f"{everything:,}", f"{total:,}"
    ).replace("100.0000", f"{100 * trained / total:.4f}")


@pytest.mark.parametrize("family", ["full", "lora"])
def test_unloaded_with_pefts_options_it_is_frozen_and_goes_on_as_it_was(family: str) -> None:
    """As PEFT leaves a model, and as the next adapter needs it."""
    adapted = Adapted("llama", "own", family)
    fill(adapted.model)
    expected = adapted.output()
    model = adapted.model.merge_and_unload(**OPTIONS)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    torch.testing.assert_close(output_of(model, "llama"), expected, rtol=1e-4, atol=1e-4)


def test_unloaded_it_takes_the_next_adapter() -> None:
    adapted, lora = Adapted("llama", "own", "full"), Adapted("llama", "own")
    model = adapted.model.unload()
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    again = adapt(model, lora.plan, lora.config)
    assert again.get_nb_trainable_parameters() == lora.model.get_nb_trainable_parameters()
    whole = adapt(again.unload(), adapted.plan, adapted.config)
    trained, everything = whole.get_nb_trainable_parameters()
    assert trained == everything
