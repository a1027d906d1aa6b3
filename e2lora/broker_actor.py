"""The broker as an asyncio actor: a call that waits for something holds up no other."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from e2lora.broker import Attempt, Broker, Job, Running, Update
from e2lora.config import GroupSpec
from e2lora.records import Failure

WAIT_SECONDS = 5.0  # for which a call waits before it says that there is nothing
LOOK_SECONDS = 0.5  # between looks at what comes with time alone: leases that run out


class BrokerActor:
    """What :class:`e2lora.broker.Broker` does, for calls from afar."""

    def __init__(self, lease_seconds: float) -> None:
        self._broker = Broker(lease_seconds)
        self._changed = asyncio.Event()

    async def next_attempt(
        self, group: str, incarnation: int, spec: GroupSpec
    ) -> Attempt | str | None:
        return await self._first(lambda: self._broker.next_attempt(group, incarnation, spec))

    async def wait(self, key: str, seen: int) -> tuple[int, Update] | None:
        """What is new about a job since version ``seen``; None if nothing came in a while."""
        return await self._first(lambda: self._broker.update(key, seen))

    async def _first(self, poll: Any) -> Any:
        """Its first answer that isn't None; asked at every change, and for leases that ran out."""
        until = time.monotonic() + WAIT_SECONDS
        while (found := poll()) is None and (left := until - time.monotonic()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left, LOOK_SECONDS))
        return found

    def _after_change(self, answer: Any = None) -> Any:
        """Wake whoever waits."""
        self._changed.set()
        self._changed = asyncio.Event()
        return answer

    async def submit(self, job: Job) -> None:
        self._broker.submit(job)
        self._after_change()

    async def progress(self) -> dict[str, Running]:
        return self._broker.progress()

    async def join(self, group: str) -> int:
        return self._after_change(self._broker.join(group))

    async def leave(self, group: str) -> None:
        self._broker.leave(group)
        self._after_change()

    async def alive(
        self,
        token: str,
        step: int | None = None,
        measured: dict[str, float] | None = None,
        doing: str | None = None,
    ) -> bool:
        return self._broker.alive(token, step, measured, doing)

    async def report(
        self,
        token: str,
        evaluation: dict[str, Any],
        outcomes: dict[str, list[float]],
        history: dict[str, list[float]],
    ) -> bool:
        return self._after_change(self._broker.report(token, evaluation, outcomes, history))

    async def complete(self, token: str, result: dict[str, Any]) -> bool:
        return self._after_change(self._broker.complete(token, result))

    async def fail(self, token: str, error: str, kind: Failure = "error") -> bool:
        return self._after_change(self._broker.fail(token, error, kind))

    async def stop(self, key: str) -> bool:
        """End a job that is no longer wanted; False: it had ended already."""
        return self._after_change(self._broker.stop(key))

    async def lose(self, token: str, why: str) -> bool:
        return self._after_change(self._broker.lose(token, why))

    async def put_back(self, token: str, trouble: str) -> bool:
        return self._after_change(self._broker.put_back(token, trouble))

    async def tell_trouble(self, trouble: str) -> None:
        self._broker.tell_trouble(trouble)
        self._after_change()

    async def trouble(self) -> str | None:
        return self._broker.trouble()

    async def demand(self) -> tuple[dict[GroupSpec, int], set[str], dict[str, float]]:
        """Jobs waiting by kind, the groups at work, and for how long each was silent."""
        return self._broker.demand(), self._broker.busy_groups(), self._broker.silences()

    async def close(self) -> None:
        self._broker.close()
        self._after_change()

    async def retire(self, group: str) -> None:
        self._broker.retire(group)
        self._after_change()

    async def give_up(self, group: str) -> None:
        self._broker.give_up(group)
        self._after_change()

    async def spend(self, group: str, seconds: dict[str, float]) -> None:
        self._broker.spend(group, seconds)

    async def spent(self) -> dict[str, dict[str, float]]:
        return self._broker.spent()

    async def is_wanted(self, group: str) -> bool:
        return self._broker.is_wanted(group)
