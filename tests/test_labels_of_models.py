"""A head that the weights hold already must have as many labels as the task."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    RobertaConfig,
)

from e2lora.config import ModelConfig
from e2lora.models import load_model, load_structure

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TRAINED = {
    "bert": BertConfig(**SMALL, vocab_size=64, num_labels=3),
    "roberta": RobertaConfig(**SMALL, vocab_size=64, num_labels=3),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=64, num_labels=3),
}


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("num_labels", [1, 2, 4])
def test_head_of_another_number_of_labels_is_refused_before_weights_are_read(
    tmp_path: Path, kind: str, num_labels: int
) -> None:
    AutoModelForSequenceClassification.from_config(TRAINED[kind]).save_pretrained(tmp_path)
    for load in (load_structure, lambda *given: load_model(*given, torch.float32)):
        with pytest.raises(
            ValueError, match=rf"of 3 label\(s\), and the task has {num_labels}\. Name"
        ):
            load(ModelConfig(name=str(tmp_path)), AutoModelForSequenceClassification, num_labels)


@pytest.mark.parametrize("kind", TRAINED)
def test_head_that_was_left_out_as_told_is_initialised_anew(tmp_path: Path, kind: str) -> None:
    AutoModelForSequenceClassification.from_config(TRAINED[kind]).save_pretrained(tmp_path / "of 3")
    AutoModel.from_pretrained(tmp_path / "of 3").save_pretrained(tmp_path / "without")
    model, head = load_model(
        ModelConfig(name=str(tmp_path / "without")),
        AutoModelForSequenceClassification,
        2,
        torch.float32,
    )
    assert head
    assert model.config.num_labels == 2
    kept, none = load_model(
        ModelConfig(name=str(tmp_path / "of 3")),
        AutoModelForSequenceClassification,
        3,
        torch.float32,
    )
    assert none == ()
    assert not any(p.requires_grad for p in kept.parameters())


def test_two_labels_without_names_in_the_configuration_are_two(tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_config(
        BertConfig(**SMALL, vocab_size=64)
    ).save_pretrained(tmp_path)
    assert "id2label" not in (tmp_path / "config.json").read_text()
    name = ModelConfig(name=str(tmp_path))
    assert load_model(name, AutoModelForSequenceClassification, 2, torch.float32)[1] == ()
    with pytest.raises(ValueError, match=r"of 2 label\(s\), and the task has 3"):
        load_structure(name, AutoModelForSequenceClassification, 3)
