"""The view of a study that MLflow's page of runs shows: size against score, under *Views*.

MLflow keeps the views that users save as tags of the experiment. One written here is opened like
those: by its name, or by a link. What stands in it was seen in MLflow 3.17; a page of another
version that reads it otherwise shows its own charts, and all runs are there all the same.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

from e2lora.config import Objective

VIEW_TAG = "mlflow.sharedViewState."
"""Before a view's key."""
SIZE = "adapter_parameters"
COLUMNS = ("params.`system`", "params.`budget`", "params.`learning_rate`", "params.`seed`")
SECTION = "size and score"
MOST_RUNS = 1000
"""In a chart; the page's own default is 100."""


def saved_view(name: str, run_filter: str, objectives: Sequence[Objective], now: int) -> str:
    """The value of a view's tag.

    Args:
        run_filter: of the runs that it shows.
        objectives: the study's; each metric among them has a chart.
        now: milliseconds since 1970.
    """
    state = json.dumps(_state(run_filter, objectives))
    packed = base64.b64encode(zlib.compress(state.encode(), 9)).decode()
    view = {"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    return json.dumps(view)


def shows_the_same(value: str, other: str | None) -> bool:
    """Whether two values of tags differ at most in their times."""
    ours, theirs = json.loads(value), json.loads(other or "{}")
    return all(ours[key] == theirs.get(key) for key in ("name", "state"))


def _state(run_filter: str, objectives: Sequence[Objective]) -> dict[str, Any]:
    """The page's own form; what is left out, the page makes: a chart for each other metric."""
    scores = [objective for objective in objectives if objective.name != SIZE]
    names = [score.name for score in scores]
    charts: list[dict[str, Any]] = [
        {
            "type": "SCATTER",
            "xaxis": {"key": SIZE, "type": "METRIC"},
            "yaxis": {"key": name, "type": "METRIC"},
        }
        for name in names
    ]
    charts.append(
        {
            "type": "PARALLEL",
            "selectedParams": ["system", "learning_rate"],
            "selectedMetrics": [SIZE, *names],
            "showAllRuns": True,
        }
    )
    ours = {"deleted": False, "isGenerated": False}
    return {
        "searchFilter": run_filter,
        # in order of a metric, the page doesn't hide children below their parent
        "orderByKey": f"metrics.`{names[0] if names else SIZE}`",
        "orderByAsc": not names or scores[0].direction == "minimize",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*COLUMNS, *(f"metrics.`{o.name}`" for o in objectives)],
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [
            {
                "uuid": f"e2lora-{place}",
                "metricSectionId": SECTION,
                "runsCountToCompare": MOST_RUNS,
                **ours,
                **chart,
            }
            for place, chart in enumerate(charts)
        ],
        "compareRunSections": [
            {
                "uuid": SECTION,
                "name": SECTION,
                "display": True,
                "isReordered": False,
                "columns": len(charts),
                "cardHeight": 500,
                **ours,
            }
        ],
        "isAccordionReordered": True,  # the page leaves this section above its own
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
    }
