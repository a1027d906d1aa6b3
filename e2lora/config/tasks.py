"""What is trained on: one class per kind of task."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from e2lora.config.frozen import Frozen


class TaskConfig(Frozen):
    """What every task says of its data; the tasks' own classes below add how columns are read.

    ``data`` is a hub name, a local file or folder, or ``demo:NAME``. A search looks at the
    validation rows only; the test rows are scored once, by final runs.
    """

    data: str
    subset: str | None = None
    train_split: str = "train"
    validation_split: str | None = Field(
        default=None, description="None: carved from the training split, by `split_seed`"
    )
    validation_size: int = Field(default=1000, gt=0, description="rows carved, or kept, at most")
    split_seed: int = Field(default=0, ge=0)
    test_split: str | None = Field(default=None, description="None: there are no test rows")
    test_data: str | None = Field(default=None, description="None: the test rows lie in `data`")
    test_subset: str | None = None
    test_columns: dict[str, str] = Field(
        default={}, description="columns of `data` → what `test_data` calls them, where it differs"
    )

    @property
    def display_name(self) -> str:
        return f"{self.data}/{self.subset}" if self.subset else self.data

    @model_validator(mode="after")
    def _test_rows_are_named(self) -> TaskConfig:
        given = [
            name for name in ("test_data", "test_subset", "test_columns") if getattr(self, name)
        ]
        if given and self.test_split is None:
            raise ValueError(
                f"{', '.join(given)} say where the test rows are, so `test_split` must name them; "
                "got none. Set `test_split`."
            )
        seen = {self.train_split, self.validation_split} - {None}
        if self.test_data is None and self.test_split in seen:
            raise ValueError(
                "test rows are looked at once, in the end, so they can't be among those that "
                f"training looks at; got test_split={self.test_split!r} for both. Name another "
                "split; without a `validation_split` one is carved from the training rows."
            )
        if (self.test_subset or self.test_columns) and self.test_data is None:
            raise ValueError(
                "`test_subset` and `test_columns` are of `test_data`; got none. Set `test_data`."
            )
        return self


JUDGED_BY = (
    "what the task is judged by: given as `score` too, the objective of several tasks at once"
)


class TextsConfig(TaskConfig):
    """One text, or a pair of texts, and a label."""

    text_column: str = "text"
    text2_column: str | None = None
    label_column: str = "label"
    max_length: int = Field(default=128, gt=1, description="tokens; longer texts are cut")


class TextClassificationConfig(TextsConfig):
    """One text, or a pair of texts, to one of several labels."""

    kind: Literal["text_classification"] = "text_classification"
    metric: Literal["accuracy", "f1", "macro_f1", "mcc"] = Field(
        default="accuracy", description=JUDGED_BY
    )


class RegressionConfig(TextsConfig):
    """One text, or a pair of texts, to a number."""

    kind: Literal["regression"] = "regression"
    metric: Literal["pearson", "spearman"] = Field(default="pearson", description=JUDGED_BY)


class ImageClassificationConfig(TaskConfig):
    """An image to one of several labels."""

    kind: Literal["image_classification"] = "image_classification"
    image_column: str = "image"
    label_column: str = "label"
    raw_shape: tuple[int, ...] | None = Field(
        default=None,
        description="of a column of raw bytes: height and width, and 3 where it has colours",
    )
    metric: Literal["accuracy", "f1", "macro_f1", "mcc"] = Field(
        default="accuracy", description=JUDGED_BY
    )


class GenerationConfig(Frozen):
    """How a causal model writes its answers when it is scored. Nothing here is about training."""

    max_new_tokens: int = Field(default=256, gt=0)
    stop: tuple[str, ...] = Field(default=(), description="texts that end an answer, and are cut")
    batch_size: int = Field(default=16, gt=0, description="prompts at a time, per worker")
    temperature: float = Field(default=0.0, ge=0, description="0: always the likeliest token")
    top_p: float = Field(default=1.0, gt=0, le=1)
    num_samples: int = Field(default=1, gt=0, description="answers per prompt")
    seed: int = Field(default=0, ge=0)
    max_validation_rows: int | None = Field(
        default=None, ge=0, description="the first so many; test rows are always all answered"
    )
    every_evaluation: bool = Field(
        default=False, description="False: once, when training has ended"
    )

    @model_validator(mode="after")
    def _samples_differ(self) -> GenerationConfig:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                "without chance all samples of a prompt are the same; got num_samples="
                f"{self.num_samples} at temperature 0. Set `temperature`, or num_samples=1."
            )
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(
                f"`top_p` restricts chance; got {self.top_p} at temperature 0. Set `temperature`, "
                "or leave `top_p` out."
            )
        return self


class PromptsConfig(TaskConfig):
    """Prompts and answers of a causal model, and how a prompt is put to it."""

    prompt_column: str = "prompt"
    answer_column: str = "answer"
    context_column: str | None = Field(
        default=None, description="put behind the prompt, after a blank line, where not empty"
    )
    template: str = Field(
        default="{prompt}\n", description="what stands before the answer; holds {prompt} once"
    )
    chat: bool = Field(
        default=False,
        description="the tokenizer's chat template: template's text as the user's turn",
    )
    system: str | None = Field(default=None, description="the system's turn of a chat")
    num_shots: int = Field(
        default=0, ge=0, description="worked examples, from the training rows, before every prompt"
    )
    max_length: int = Field(default=512, gt=1, description="tokens; longer answers are cut")

    @model_validator(mode="after")
    def _prompt_is_put_as_told(self) -> PromptsConfig:
        if self.template.count("{prompt}") != 1:
            raise ValueError(
                f"`template` must hold {{prompt}} exactly once; got {self.template!r}. Write the "
                "prompt's place as {prompt}."
            )
        if self.system is not None and not self.chat:
            raise ValueError(
                f"`system` is a turn of a chat; got {self.system[:40]!r} with chat=False. Set "
                "chat=True, or write it into `template`."
            )
        return self


class SftConfig(PromptsConfig):
    """Supervised fine-tuning of a causal model: a prompt and the answer it is to give."""

    kind: Literal["sft"] = "sft"
    verify: Literal["number", "exact", "equation"] | None = Field(
        default=None, description="how written answers are judged; None: none are written"
    )
    final_column: str | None = Field(
        default=None, description="what an answer must come to; None: taken from `answer_column`"
    )
    numbers_column: str | None = Field(
        default=None, description="of equations over number0, number1, …: their values"
    )
    generation: GenerationConfig = GenerationConfig()


class MultipleChoiceConfig(PromptsConfig):
    """A prompt with several answers, of which the likeliest is the model's choice.

    ``answer_column`` holds the right one's text; where choices have labels, its label; or its
    place among them, from 0, where it is an integer (or, of two, a truth value).
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    choices: tuple[str, ...] | None = Field(default=None, description="the same for every row")
    choices_column: str | None = Field(
        default=None, description="a list of texts, or of texts and labels as on the hub"
    )
    choices_pattern: str | None = Field(
        default=None, description="finds in the prompt, as its group, choices with / between them"
    )
    answer_prefix: str = Field(
        default="",
        description="before every choice, and made tokens with it: a space behind 'Answer:'",
    )

    @model_validator(mode="after")
    def _choices_are_named_once(self) -> MultipleChoiceConfig:
        ways = ("choices", "choices_column", "choices_pattern")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "a row's choices are given by exactly one of `choices`, `choices_column` and "
                f"`choices_pattern`; got {' and '.join(given) or 'none'}. Set one."
            )
        return self

    @model_validator(mode="after")
    def _choices_can_be_told_apart(self) -> MultipleChoiceConfig:
        if self.choices is None:
            return self
        if len(set(self.choices)) < max(2, len(self.choices)) or not all(
            map(str.strip, self.choices)
        ):
            raise ValueError(
                "`choices` are two texts at least, all different and none of them empty; got "
                f"{self.choices}. Correct them."
            )
        return self

    @model_validator(mode="after")
    def _pattern_has_a_group(self) -> MultipleChoiceConfig:
        if self.choices_pattern is None:
            return self
        try:
            groups = re.compile(self.choices_pattern).groups
        except re.error as error:
            raise ValueError(
                f"`choices_pattern` must be a regular expression; got {self.choices_pattern!r}: "
                f"{error}. Correct it."
            ) from error
        if groups != 1:
            raise ValueError(
                "`choices_pattern` finds the choices as its only group; got "
                f"{self.choices_pattern!r} with {groups}. Put them, and nothing else, in (...)."
            )
        return self


class CodeConfig(PromptsConfig):
    """Programs that a causal model writes, judged by running their tests.

    Model-written programs are run only where ``execution`` says so by name.
    """

    kind: Literal["code"] = "code"
    execution: Literal["off", "sandbox"] = "off"
    problems: Literal["humaneval", "mbpp"] = Field(
        default="humaneval", description="what the rows with tests look like"
    )
    messages_column: str | None = Field(
        default=None,
        description="in place of prompt and answer: conversations, of which the first exchange",
    )
    k: tuple[int, ...] = Field(default=(1,), min_length=1)
    seconds: float = Field(
        default=10.0,
        gt=0,
        description="of CPU time, per program; four times as many by the clock",
    )
    memory_mib: int = Field(default=1024, ge=16, description="per program")
    generation: GenerationConfig = GenerationConfig()

    @property
    def problems_throughout(self) -> bool:
        """Whether training rows are problems too, as they are unless test rows lie elsewhere."""
        return self.test_data is None

    @model_validator(mode="after")
    def _enough_samples(self) -> CodeConfig:
        if min(self.k) < 1 or max(self.k) > self.generation.num_samples:
            raise ValueError(
                "pass@k is estimated from at least k programs per problem; got "
                f"k={self.k} and num_samples={self.generation.num_samples}. Raise "
                "`generation.num_samples` (and set its `temperature`), or lower `k`."
            )
        return self


AnyTaskConfig = Annotated[
    TextClassificationConfig
    | RegressionConfig
    | ImageClassificationConfig
    | SftConfig
    | MultipleChoiceConfig
    | CodeConfig,
    Field(discriminator="kind"),
]
TASK_CONFIGS: dict[str, type[TaskConfig]] = {
    config.model_fields["kind"].default: config
    for config in (
        TextClassificationConfig,
        RegressionConfig,
        ImageClassificationConfig,
        SftConfig,
        MultipleChoiceConfig,
        CodeConfig,
    )
}
