"""Untrusted Python programs, each in a process that is locked in: see ``sandboxed.py``.

Such a process has no network, reads no file but those of Python itself and writes none, has no
environment, and can't start, signal or look into another process. What remains: it is the machine's
own kernel that it calls; it can ask of any path whether it exists, how large and how old it is, and
where a link leads; and it can lie about itself, since its tests run in the same interpreter: by
objects that equal everything, by replacing what the tests call, or by taking, from the frames or
the memory of that interpreter, the token that says that they have passed.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from e2lora.tasks.sandboxed import LOCKED

PROGRAM = Path(__file__).with_name("sandboxed.py")
MIB = 2**20
MOST_OUTPUT = MIB
PATIENCE = 4  # times its seconds: a program also waits, for processors that others use
START_UP = 120.0  # seconds until a process is locked in, by the clock
SHOWN = 2000  # characters of what it printed last


@dataclass(frozen=True)
class Limits:
    """Of one program; ``seconds`` of CPU time, and by the clock ``PATIENCE`` times as many."""

    seconds: float = 10.0
    memory_mib: int = 1024


class Ran(NamedTuple):
    """How a program ended.

    ``reason``: ``passed``, ``failed``, ``timed out``, ``out of memory``, ``wrote too much``.
    """

    reason: str
    said: str

    @property
    def passed(self) -> bool:
        return self.reason == "passed"


def run(
    program: str,
    limits: Limits = Limits(),
    on_start: Callable[[subprocess.Popen[bytes]], None] = lambda process: None,
) -> Ran:
    """Run a program; it has passed when it ran to its end, without an error or an early exit.

    Args:
        on_start: is given the process, to end it early.

    Raises:
        RuntimeError: this machine has no sandbox.
    """
    with tempfile.TemporaryDirectory(prefix="e2lora-program-") as folder:
        return _run_in(folder, program, limits, on_start)


def _run_in(
    folder: str,
    program: str,
    limits: Limits,
    on_start: Callable[[subprocess.Popen[bytes]], None],
) -> Ran:
    """With an empty folder, which stays empty, to be in."""
    token = secrets.token_hex(16)
    result, its_result = os.pipe()
    os.set_blocking(result, False)  # whoever else holds its other end can't keep us waiting
    with open(result, "rb", buffering=0) as result_file:
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", str(PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8:replace"},
                cwd=folder,
                pass_fds=(its_result,),
                start_new_session=True,
            )
        finally:
            os.close(its_result)
        told = {
            "program": program,
            "token": token,
            "result": its_result,
            "parent": os.getpid(),
            "readable": [*_readable(), folder],
            "limits": _rlimits(limits),
        }
        with process:
            try:
                on_start(process)
                _tell(process, json.dumps(told).encode(), result_file)
                began = time.monotonic()
                ended, said = _watched(process, began + PATIENCE * limits.seconds)
                lasted = time.monotonic() - began
            finally:
                process.kill()
        result_said = result_file.read() or b""
    if not result_said.startswith(LOCKED):
        raise RuntimeError(
            "programs that a model wrote are run only in a sandbox, which this machine can't "
            f"give: {said.strip()} (exit status {process.returncode}). Use Linux 5.13 or newer on "
            "x86_64 or aarch64, or execution='off'."
        )
    if ended is None and result_said == LOCKED + token.encode():
        return Ran("passed", said)
    used_up = lasted >= limits.seconds
    if ended is None and used_up and process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        ended = "timed out"
    if ended is None and (process.returncode == -signal.SIGKILL or _lacked_memory(said)):
        ended = "out of memory"
    return Ran(ended or "failed", said)


def run_all(
    programs: Sequence[str],
    limits: Limits = Limits(),
    on_done: Callable[[], None] = lambda: None,
) -> list[Ran]:
    """Run programs, as many at a time as there are CPUs; interrupted, it ends them."""
    started: list[subprocess.Popen[bytes]] = []

    def one(program: str) -> Ran:
        ran = run(program, limits, started.append)
        on_done()
        return ran

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        try:
            return list(pool.map(one, programs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.kill()
            raise


@lru_cache(maxsize=1)
def require_sandbox() -> None:
    """Try, with a harmless program, that this machine locks programs in.

    Raises:
        RuntimeError: what it lacks, and what to do.
    """
    ran = run(PROBE)
    if not ran.passed:
        raise RuntimeError(
            "programs are run only in a sandbox that holds; a harmless one got out of it here: "
            f"{ran.reason}: {ran.said.strip()}. Use execution='off' on this machine."
        )


PROBE = """
import os, socket
def refused(attempt):
    try:
        attempt()
    except PermissionError:
        return True
assert refused(lambda: open("/etc/passwd")), "a file outside could be read"
assert refused(lambda: open("/tmp/e2lora-probe", "w")), "a file outside could be written"
assert refused(lambda: socket.socket()), "a socket could be made"
assert refused(lambda: os.fork()), "a process could be started"
assert refused(lambda: os.kill(os.getppid(), 0)), "a signal could be sent"
"""


def _tell(process: subprocess.Popen[bytes], told: bytes, result: FileIO) -> None:
    """What it shall run; returns when it has locked itself in, has ended, or takes too long."""
    assert process.stdin is not None
    try:
        with process.stdin:
            process.stdin.write(told)
    except BrokenPipeError:  # it ended before it heard: what it printed says why
        pass
    with selectors.DefaultSelector() as selector:
        selector.register(result, selectors.EVENT_READ)
        selector.select(START_UP)


def _watched(process: subprocess.Popen[bytes], until: float) -> tuple[str | None, str]:
    """Why the process had to be ended, or None; and what it printed last."""
    assert process.stdout is not None
    printed, tail = 0, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = until - time.monotonic()
            if left <= 0 or not selector.select(left):
                return "timed out", _text(tail)
            chunk = os.read(process.stdout.fileno(), 2**16)
            if not chunk:  # all of its descriptors are closed: it has ended, or will
                break
            printed, tail = printed + len(chunk), (tail + chunk)[-SHOWN:]
            if printed > MOST_OUTPUT:
                return "wrote too much", _text(tail)
    try:
        process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "timed out", _text(tail)
    return None, _text(tail)


def _rlimits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_CPU": math.ceil(limits.seconds),
        "RLIMIT_AS": limits.memory_mib * MIB,
        "RLIMIT_DATA": limits.memory_mib * MIB,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }


@lru_cache(maxsize=1)
def _readable() -> list[str]:
    """What Python itself needs: its library, and the machine's shared ones."""
    paths = sysconfig.get_paths()
    variables = sysconfig.get_config_vars("DESTSHARED", "LIBDIR")
    named = [paths["stdlib"], *variables]  # of a virtual environment, what it was made from
    named += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    named += ["/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom"]
    found = {os.path.realpath(path) for path in named if path and os.path.exists(path)}
    return sorted(found)


def _lacked_memory(said: str) -> bool:
    lines = said.strip().splitlines()
    return bool(lines) and lines[-1].startswith("MemoryError")


def _text(tail: bytes) -> str:
    return tail.decode("utf-8", "replace")
