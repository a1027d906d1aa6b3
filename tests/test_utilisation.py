"""Where groups' time goes, as shares of a run's wall time on all its slots."""

from __future__ import annotations

import pytest

from e2lora.broker import Broker, Job
from e2lora.utilisation import PARTS, Utilisation
from tests.test_broker import SPEC, Clock


def test_shares_are_of_wall_time_times_slots_and_add_up() -> None:
    spent = {"steps": 300.0, "other": 60.0, "loading": 8.0, "starting": 20.0}
    used = Utilisation(wall_seconds=200.0, slots=2, spent=spent)
    assert [used.share(part) for part in PARTS] == [0.75, 0.15, 0.02]
    assert used.share("starting") == 0.05
    assert used.idle == pytest.approx(0.03)
    assert used.line() == (
        "utilisation 90 % of 2 slots (75 % in training steps, 15 % in evaluation and saving; "
        "5 % start-up of groups, 2 % loading, 3 % between trials)"
    )


def test_run_in_which_nothing_was_trained_used_nothing() -> None:
    nothing = Utilisation(wall_seconds=0.0, slots=0, spent={})
    assert nothing.line().startswith("utilisation 0 % of 0 slots")
    assert nothing.idle == 1.0


def test_broker_adds_up_what_each_group_tells_though_its_job_was_stopped() -> None:
    broker = Broker(clock=Clock())
    broker.submit(Job("a", "trial", SPEC, {}))
    broker.next_attempt("g1", broker.join("g1"), SPEC)
    broker.stop("a")
    broker.spend("g1", {"steps": 3.0, "other": 1.0})
    broker.spend("g1", {"steps": 2.0, "loading": 0.5})
    broker.spend("g2", {"steps": 7.0})
    assert broker.spent() == {
        "g1": {"steps": 5.0, "other": 1.0, "loading": 0.5},
        "g2": {"steps": 7.0},
    }
