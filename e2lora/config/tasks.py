"""What is trained on: one class per kind of task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from e2lora.config.frozen import Frozen


class TaskConfig(Frozen):
    """What every task says of its data; the tasks' own classes below add how columns are read.

    ``data`` is a hub name, a local file or folder, or ``demo:NAME``.
    """

    data: str
    subset: str | None = None
    train_split: str = "train"
    validation_split: str | None = Field(
        default=None, description="None: carved from the training split, by `split_seed`"
    )
    validation_size: int = Field(default=1000, gt=0, description="rows carved, or kept, at most")
    split_seed: int = Field(default=0, ge=0)

    @property
    def display_name(self) -> str:
        return f"{self.data}/{self.subset}" if self.subset else self.data


class TextClassificationConfig(TaskConfig):
    """One text, or a pair of texts, to one of several labels."""

    kind: Literal["text_classification"] = "text_classification"
    text_column: str = "text"
    text2_column: str | None = None
    label_column: str = "label"
    max_length: int = Field(default=128, gt=1, description="tokens; longer texts are cut")


class SftConfig(TaskConfig):
    """Supervised fine-tuning of a causal model: a prompt and the answer it is to give."""

    kind: Literal["sft"] = "sft"
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    template: str = Field(
        default="{prompt}\n", description="what stands before the answer; holds {prompt} once"
    )
    max_length: int = Field(default=512, gt=1, description="tokens; longer answers are cut")

    @model_validator(mode="after")
    def _template_holds_the_prompt(self) -> SftConfig:
        if self.template.count("{prompt}") != 1:
            raise ValueError(
                f"`template` must hold {{prompt}} exactly once; got {self.template!r}. Write the "
                "prompt's place as {prompt}."
            )
        return self


AnyTaskConfig = Annotated[TextClassificationConfig | SftConfig, Field(discriminator="kind")]
