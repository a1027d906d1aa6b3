"""Registers a study's winner as a model: on request, after training.

What is stored is the adapter, the plan, this package's code, and the *name* of the base model: its
weights are loaded from where they lie, and refused if they aren't those of the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import e2lora
from e2lora.config import TrialConfig
from e2lora.records import TrialFolder, TrialResult, write_json
from e2lora.tracking import Tracker
from e2lora.tracking.contents import RESULT_TAG
from e2lora.tracking.predictor import AnsweringRecord, ColumnType, require_answered

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

REQUIRED = (
    "accelerate",
    "filelock",
    "mlflow",
    "numpy",
    "peft",
    "pydantic",
    "safetensors",
    "scipy",
    "torch",
    "transformers",
)
"""Packages that answering needs, of which the versions at hand are recorded."""


def register_winner(tracker: Tracker, winner: TrialFolder, name: str) -> str:
    """``models:/NAME/VERSION`` of a trial's adapter; the same again for the same result.

    Args:
        winner: a whole trial of either stage of the tracker's study.

    Raises:
        ValueError: a trial that can't be a model.
        RuntimeError: MLflow doesn't answer, or refuses the model. Nothing is lost: ask again.
    """
    result, config = _require_whole(winner), winner.config()
    require_answered(config.task)
    run_id = tracker.run_id_of(winner)
    tags = {RESULT_TAG: result.fingerprint(), "e2lora.system": config.system}
    with tracker.asking(f"register the model {name!r}") as client:
        for known in client.search_model_versions(f"name = '{name}'"):
            if known.tags.get(RESULT_TAG) == tags[RESULT_TAG]:
                return f"models:/{known.name}/{known.version}"
    record = AnsweringRecord.of(config.task)
    with TemporaryDirectory(prefix="e2lora-model-") as passing:
        model = Path(passing) / "model"
        _write_model(model, Path(passing), winner, record, config)
        with tracker.asking(f"register the model {name!r}") as client:
            logged = _logged(client, tracker.experiment_id, run_id, model, tags)
            _make_sure_of(client, name)
            made = client.create_model_version(
                name,
                # without a server, MLflow would look for models:/ID in the store of its default
                logged.artifact_location if tracker.is_database else f"models:/{logged.model_id}",
                run_id,
                tags,
                description=_described(config, result),
                model_id=logged.model_id,
            )
    return f"models:/{made.name}/{made.version}"


def _require_whole(winner: TrialFolder) -> TrialResult:
    result = winner.result()
    if result is None or result.state != "complete":
        raise ValueError(
            "a model is made of a trial that ran to its end; "
            f"{winner.path} {'goes on' if result is None else f'is {result.state}'}. Name another "
            "trial, or run the study again."
        )
    if not winner.adapter.is_dir():
        raise ValueError(
            f"a model is made of a trial's adapter; {winner.adapter} is not there. Train it by "
            "`jobs/train.py --from-study`."
        )
    return result


def _write_model(
    place: Path, beside: Path, winner: TrialFolder, record: AnsweringRecord, config: TrialConfig
) -> None:
    """MLflow's form of a model, in a new folder. No weights are loaded."""
    from mlflow.pyfunc import save_model

    write_json(beside / "record.json", record)
    write_json(beside / "trial.json", config)
    artifacts = {
        "adapter": winner.adapter,
        "record": beside / "record.json",
        "trial": beside / "trial.json",
    }
    package = Path(e2lora.__file__).parent
    save_model(
        place,
        python_model=str(package / "tracking" / "served.py"),
        artifacts={name: str(path) for name, path in artifacts.items()},
        code_paths=[str(package)],
        signature=_signature(record),
        # made up: rows of the data may not be meant for everyone who reads the registry
        input_example={name: [f"An example of a {name}."] for name in record.inputs},
        pip_requirements=_requirements(config),
        metadata={"base_model": config.model.name, "labels": list(record.labels)},
    )


def _requirements(config: TrialConfig) -> Sequence[str]:
    """Pinned to what is at hand; a local build's mark (torch's +cpu) is in no registry."""
    names = (*REQUIRED, *(["bitsandbytes"] if config.model.quantization else []))
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]


def _signature(record: AnsweringRecord) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    types: dict[ColumnType, DataType | Array] = {
        "string": DataType.string,
        "long": DataType.long,
        "double": DataType.double,
        "doubles": Array(DataType.double),
    }
    inputs: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, name) for name in record.inputs]
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec(types[kind], name) for name, kind in record.outputs.items()
    ]
    return ModelSignature(Schema(inputs), Schema(outputs))


def _logged(
    client: MlflowClient, experiment_id: str, run_id: str, model: Path, tags: dict[str, str]
) -> LoggedModel:
    """The trial's model in MLflow: one that is there whole, or a new one."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    query = f"tags.`{RESULT_TAG}` = '{tags[RESULT_TAG]}'"
    for known in client.search_logged_models([experiment_id], query):
        if known.status == LoggedModelStatus.READY:
            return known
    made = client.create_logged_model(experiment_id, "adapter", run_id, tags, model_type="adapter")
    client.log_model_artifacts(made.model_id, str(model))
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step=0)])
    return client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)


def _make_sure_of(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _described(config: TrialConfig, result: TrialResult) -> str:
    metrics = ", ".join(f"{name} {value:.6g}" for name, value in result.metrics.items())
    return (
        f"{config.label} on {config.model.name}, trained on {config.task.display_name}: {metrics}; "
        f"{result.adapter_parameters:,} adapter parameters"
    )
