"""Untrusted Python programs, each in a process that is locked in: see ``sandboxed.py``.

Such a process has no network, no file but those of Python itself and its own empty folder, no
environment, and can't start, signal or look into another one. What remains: it is the machine's own
kernel that it calls, and a program that digs through its interpreter's memory can find the token by
which it would seem to have passed its tests. It can lie about itself; it can't reach anything.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import shutil
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
from pathlib import Path
from typing import NamedTuple

from e2lora.tasks.sandboxed import CANNOT

PROGRAM = Path(__file__).with_name("sandboxed.py")
MIB = 2**20
MOST_OUTPUT, MOST_WRITTEN, MOST_FILES = MIB, 64 * MIB, 1000
LOOK_SECONDS = 0.05  # between two looks at what a program has written
SHOWN = 2000  # characters of what it printed last


@dataclass(frozen=True)
class Limits:
    """Of one program; ``seconds`` of CPU time as of the clock."""

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


def run(program: str, limits: Limits = Limits()) -> Ran:
    """Run a program; it has passed when it ran to its end, without an error or an early exit.

    Raises:
        RuntimeError: this machine has no sandbox.
    """
    folder = tempfile.mkdtemp(prefix="e2lora-program-")
    try:
        return _run_in(folder, program, limits)
    finally:
        _remove(folder)


def run_all(
    programs: Sequence[str],
    limits: Limits = Limits(),
    on_done: Callable[[], None] = lambda: None,
) -> list[Ran]:
    """Run programs, as many at a time as there are CPUs."""

    def one(program: str) -> Ran:
        ran = run(program, limits)
        on_done()
        return ran

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(one, programs))


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


def _run_in(folder: str, program: str, limits: Limits) -> Ran:
    token = secrets.token_hex(16)
    result, its_result = os.pipe()
    with open(result, "rb") as result_file:
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", str(PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8:replace"},
                cwd="/",
                pass_fds=(its_result,),
                start_new_session=True,
            )
        finally:
            os.close(its_result)
        told = {
            "program": program,
            "token": token,
            "result": its_result,
            "folder": folder,
            "readable": _readable(),
            "limits": _rlimits(limits),
        }
        with process:
            try:
                ended, said = _watched(process, json.dumps(told).encode(), folder, limits)
            finally:
                process.kill()
        if process.returncode == CANNOT:
            raise RuntimeError(
                "programs that a model wrote are run only in a sandbox, which this machine can't "
                f"give: {said.strip()}. Use Linux 5.13 or newer on x86_64 or aarch64, or "
                "execution='off'."
            )
        if ended is None and result_file.read() == token.encode():
            return Ran("passed", said)
    if ended is None and process.returncode == -signal.SIGXCPU:
        ended = "timed out"
    if ended is None and (process.returncode == -signal.SIGKILL or _lacked_memory(said)):
        ended = "out of memory"
    return Ran(ended or "failed", said)


def _watched(
    process: subprocess.Popen[bytes], told: bytes, folder: str, limits: Limits
) -> tuple[str | None, str]:
    """Why the process had to be ended, or None; and what it printed last."""
    assert process.stdin is not None
    assert process.stdout is not None
    until, printed, tail = time.monotonic() + limits.seconds, 0, b""
    try:
        process.stdin.write(told)
        process.stdin.close()
    except BrokenPipeError:  # it ended before it heard: what it printed says why
        pass
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if time.monotonic() > until:
                return "timed out", _text(tail)
            if selector.select(LOOK_SECONDS):
                chunk = os.read(process.stdout.fileno(), 2**16)
                if not chunk:  # all of its descriptors are closed: it has ended, or will
                    break
                printed, tail = printed + len(chunk), (tail + chunk)[-SHOWN:]
            if printed > MOST_OUTPUT or _written(folder) > MOST_WRITTEN:
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
        "RLIMIT_FSIZE": MOST_WRITTEN,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }


@lru_cache(maxsize=1)
def _readable() -> list[str]:
    """What Python itself needs: its library, and the machine's shared ones."""
    paths = sysconfig.get_paths()
    named = [paths["stdlib"], paths["platstdlib"], sysconfig.get_config_var("LIBDIR")]
    named += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    named += ["/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom"]
    found = {os.path.realpath(path) for path in named if path and os.path.exists(path)}
    return sorted(found)


def _written(folder: str) -> int:
    """Bytes below a folder; many files count as many bytes."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            total += MOST_WRITTEN // MOST_FILES
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
            if total > MOST_WRITTEN:
                return total
    return total


def _lacked_memory(said: str) -> bool:
    lines = said.strip().splitlines()
    return bool(lines) and lines[-1].startswith("MemoryError")


def _text(tail: bytes) -> str:
    return tail.decode("utf-8", "replace")


def _remove(folder: str) -> None:
    """Also folders that the program has made unreadable; links in it are not followed."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        for place, folders, _ in os.walk(folder):
            for name in folders:
                os.chmod(os.path.join(place, name), 0o700, follow_symlinks=False)
        shutil.rmtree(folder)
