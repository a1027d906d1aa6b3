"""What MLflow runs to load a registered adapter: models from code, so nothing is unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

from e2lora.tracking.predictor import AnsweringRecord, Predictor


class ServedAdapter(PythonModel):
    """Texts in, answers out, see :mod:`e2lora.tracking.predictor`; on the first GPU if any."""

    def load_context(self, context: PythonModelContext) -> None:
        record = Path(context.artifacts["record"]).read_text(encoding="utf-8")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        adapter = Path(context.artifacts["adapter"])
        self._predictor = Predictor(adapter, AnsweringRecord.model_validate_json(record), device)

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: Any = None
    ) -> pandas.DataFrame:
        """As the signature says, row by row."""
        rows = model_input.explode(list(model_input.columns))  # MLflow makes one of a dict of lists
        columns = {name: rows[name].tolist() for name in rows.columns}
        return pandas.DataFrame(self._predictor.predict(columns))


mlflow.models.set_model(ServedAdapter())
