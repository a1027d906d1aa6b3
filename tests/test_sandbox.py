"""Programs that try to break out of their sandbox: each is refused, for the reason that is named.

``CALLS`` are single attempts, made in a process that is locked in and, to see that they are real,
in one that isn't. ``PROGRAMS`` are what ends by itself, or is ended.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from e2lora.tasks import sandbox, sandboxed
from e2lora.tasks.sandbox import Limits, Ran, require_sandbox, run, run_all

ROOT = Path(__file__).resolve().parents[1]
AMPLE, QUICK = Limits(memory_mib=256), Limits(seconds=0.2, memory_mib=256)
DENIED, REFUSED = "EACCES", "EPERM"  # by Landlock, by seccomp

# The sandbox alone, without what its package imports: torch and the like take seconds.
ALONE = f"""
import sys, types
for name in ("e2lora", "e2lora.tasks"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(ROOT)!r} + "/" + name.replace(".", "/")]
"""

CALLS: dict[str, str] = {
    # reading
    "open(here('file'))": DENIED,
    "open(PROJECT)": DENIED,
    "open('/etc/passwd')": DENIED,
    "open('/proc/self/environ')": DENIED,
    "open('/proc/self/mem', 'rb')": DENIED,
    "open(f'/proc/{PARENT}/environ')": DENIED,
    "os.listdir(CANARY)": DENIED,
    "os.listdir('/proc/self/fd')": DENIED,
    "os.readlink(f'/proc/{PARENT}/cwd')": DENIED,
    "open(f'/proc/self/fd/{os.open(here(\"file\"), os.O_PATH)}')": DENIED,
    "os.chdir(CANARY)": REFUSED,
    # writing outside
    "open(here('file'), 'a')": REFUSED,
    "open(here('new'), 'w')": REFUSED,
    "open('/dev/shm/e2lora-canary', 'w')": REFUSED,
    "os.truncate(here('file'), 1)": REFUSED,
    "os.remove(here('file'))": REFUSED,
    "os.rmdir(here('folder'))": REFUSED,
    "os.mkdir(here('made'))": REFUSED,
    "os.rename(here('folder'), here('moved'))": REFUSED,
    "os.link(here('file'), here('link'))": REFUSED,
    "os.symlink('/', here('symlink'))": REFUSED,
    "os.mkfifo(here('fifo'))": REFUSED,
    "os.chmod(here('file'), 0o777)": REFUSED,
    "os.chown(here('file'), os.getuid(), os.getgid())": REFUSED,
    "os.utime(here('file'), (1, 1))": REFUSED,
    "os.setxattr(here('file'), 'user.canary', b'1')": REFUSED,
    "os.open(CANARY, os.O_TMPFILE | os.O_RDWR)": REFUSED,
    # openat2
    "syscall(437, -100, here('file').encode(), struct.pack('QQQ', 2, 0, 0), 24)": REFUSED,
    # writing in its own folder, and in memory
    "open('mine', 'w')": REFUSED,
    "os.mkdir('folder')": REFUSED,
    "os.symlink('/', 'symlink')": REFUSED,
    "os.open('.', os.O_TMPFILE | os.O_RDWR)": REFUSED,
    "os.memfd_create('mine')": REFUSED,
    # network
    "socket.create_connection(('127.0.0.1', TCP)).close()": REFUSED,
    "socket.socket().bind(('127.0.0.1', 0))": REFUSED,
    "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))": REFUSED,
    "socket.socket(socket.AF_UNIX).connect(UNIX)": REFUSED,
    "socket.socket(socket.AF_UNIX).connect(ABSTRACT)": REFUSED,
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)": REFUSED,
    "socket.socketpair()": REFUSED,
    # processes and threads
    "ended(os.fork())": REFUSED,
    "ended(syscall(57))": REFUSED,  # fork
    "ended(syscall(56, 17, 0, 0, 0, 0))": REFUSED,  # clone
    "ended(syscall(435, struct.pack('8Q', 0, 0, 0, 0, 17, 0, 0, 0), 64))": REFUSED,  # clone3
    "ended(os.posix_spawn('/bin/true', ['true'], {}))": REFUSED,
    "subprocess.run(['true'], executable='/bin/true')": REFUSED,
    "os.execv('/bin/missing', ['missing'])": REFUSED,
    "_thread.start_new_thread(int, ())": "can't start new thread",
    "syscall(272, 0)": REFUSED,  # unshare
    # signals: to others, and by descriptors and timers
    "os.kill(PARENT, 0)": REFUSED,
    "os.kill(os.getpid(), 0)": REFUSED,
    "os.kill(-1, 0)": REFUSED,
    "os.killpg(0, 0)": REFUSED,
    "os.pidfd_open(PARENT)": REFUSED,
    "syscall(222, 0, 0, bytes(8))": REFUSED,  # timer_create
    "fcntl.fcntl(1, fcntl.F_SETOWN, os.getpid())": REFUSED,
    "fcntl.fcntl(1, 10, signal.SIGURG)": REFUSED,  # F_SETSIG
    "fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL))": REFUSED,
    "fcntl.fcntl(1, 1031, 2**16)": REFUSED,  # F_SETPIPE_SZ
    "fcntl.ioctl(1, 0x5452, struct.pack('i', 0))": REFUSED,  # FIOASYNC
    "fcntl.ioctl(0, 0x5412, b'x')": REFUSED,  # TIOCSTI
    # looking into others
    "syscall(101, 0, 0, 0, 0)": REFUSED,  # ptrace
    "syscall(310, os.getpid(), *own_vector(), *own_vector(), 0)": REFUSED,  # process_vm_readv
    "syscall(312, os.getpid(), PARENT, 3, 0, 0)": REFUSED,  # kcmp
    # limits, priorities and rights
    "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))": "not allowed to raise maximum limit",
    "resource.prlimit(PARENT, resource.RLIMIT_CPU)": REFUSED,
    "os.nice(1)": REFUSED,
    "os.sched_setaffinity(0, os.sched_getaffinity(0))": REFUSED,
    "os.setuid(os.getuid())": REFUSED,
    "syscall(157, 1, 0, 0, 0, 0)": REFUSED,  # prctl: may outlive its parent
    "syscall(135, 0xFFFFFFFF)": REFUSED,  # personality
    # more of the kernel
    "syscall(425, 1, bytes(120))": REFUSED,  # io_uring_setup
    "syscall(298, bytes(120), 0, -1, -1, 0)": REFUSED,  # perf_event_open
    "syscall(321, 0, bytes(120), 120)": REFUSED,  # bpf
    "syscall(323, 1)": REFUSED,  # userfaultfd
    "syscall(250, 0, -3, 0)": REFUSED,  # keyctl
    "syscall(165, 0, b'/', 0, 0, 0)": REFUSED,  # mount
    "syscall(0x40000000 | 39)": REFUSED,  # getpid, as x32
}
# What also fails elsewhere: for lack of rights, in a container, by the kernel's configuration.
ALSO_ELSEWHERE = "272, 310, 312, 425, 298, 321, 323, 250, 165, 39) 0x5412 execv setxattr TMPFILE"

TRY = """
import _thread, ctypes, errno, fcntl, os, resource, signal, socket, struct, subprocess
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
MEMORY = ctypes.create_string_buffer(16)

def syscall(number, *arguments):
    words = [a if isinstance(a, bytes) else ctypes.c_void_p(a) for a in arguments]
    returned = LIBC.syscall(ctypes.c_long(number), *words)
    if returned == -1:
        raise OSError(ctypes.get_errno(), "by number")
    return returned

def own_vector():
    return struct.pack("PN", ctypes.addressof(MEMORY), 16), 1

def ended(child):
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

def here(name):
    return os.path.join(CANARY, name)

for number, call in enumerate(CALLS):
    BEFORE_EACH()
    try:
        eval(call)
        print(number, "got through", flush=True)
    except OSError as error:
        print(number, errno.errorcode[error.errno], flush=True)
    except Exception as error:
        print(number, error, flush=True)
"""


class Outside(NamedTuple):
    """What no program may reach."""

    canaries: list[Path]
    listeners: list[socket.socket]
    names: dict[str, Any]  # what attempts call it

    def untouched(self) -> list[Any]:
        """All that can be told of the canaries."""
        told: list[Any] = []
        for path in self.canaries:
            for at in sorted([path, *path.rglob("*")]):
                stat = at.stat()
                told.append((at, stat.st_mode, stat.st_uid, stat.st_nlink, stat.st_mtime_ns))
                told += [at.read_text()] if at.is_file() else []
                told += [os.listxattr(at)]
        return told

    def heard(self) -> list[str]:
        heard = []
        for listener in self.listeners:
            with contextlib.suppress(BlockingIOError):
                listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(1)
                heard.append(str(listener))
        return heard


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(_canary_in(place)) for place in (Path.home(), ROOT)]
        tcp, udp, unix, abstract = (
            stack.enter_context(socket.socket(*kind))
            for kind in (
                (socket.AF_INET, socket.SOCK_STREAM),
                (socket.AF_INET, socket.SOCK_DGRAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
            )
        )
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(made[0] / "socket"))
        abstract.bind(f"\0e2lora-{os.getpid()}")
        for listener in (tcp, unix, abstract):
            listener.listen()
        for listener in (tcp, udp, unix, abstract):
            listener.setblocking(False)
        names = {
            "CANARY": str(made[0]),
            "UNIX": unix.getsockname(),
            "TCP": tcp.getsockname()[1],
            "UDP": udp.getsockname()[1],
            "ABSTRACT": abstract.getsockname(),
            "PARENT": os.getpid(),
            "PROJECT": str(ROOT / "pyproject.toml"),
            "CALLS": list(CALLS),
        }
        yield Outside(made, [tcp, udp, unix, abstract], names)


@contextlib.contextmanager
def _canary_in(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".e2lora-canary-", dir=place) as folder:
        _set_canary(folder)
        yield Path(folder)


def _set_canary(folder: str) -> None:
    (Path(folder) / "file").write_text("canary")
    (Path(folder) / "folder").mkdir(exist_ok=True)


def _as_program(names: dict[str, Any], before_each: str = "def BEFORE_EACH(): pass") -> str:
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return f"{given}{before_each}\n{TRY}"


def _said_of(printed: str) -> dict[str, str]:
    lines = (line.partition(" ") for line in printed.splitlines())
    return {list(CALLS)[int(number)]: said for number, _, said in lines}


@pytest.fixture(scope="module")
def refusals(outside: Outside) -> dict[str, str]:
    before = outside.untouched()
    ran = run(_as_program(outside.names))
    assert ran.passed, ran.said
    assert outside.untouched() == before
    assert outside.heard() == []
    return _said_of(ran.said)


@pytest.mark.parametrize("call", CALLS)
def test_call_fails_for_this_reason(call: str, refusals: dict[str, str]) -> None:
    if "syscall(" in call and platform.machine() != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    assert refusals[call] == CALLS[call]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
def test_calls_succeed_in_a_process_that_is_not_locked_in(outside: Outside, tmp_path: Path) -> None:
    anew = """
def BEFORE_EACH():
    shutil.rmtree(CANARY, ignore_errors=True)
    os.makedirs(here("folder"))
    os.chdir(os.path.dirname(CANARY))
    open(here("file"), "w").close()
"""
    names = {**outside.names, "CANARY": str(tmp_path / "canary")}
    done = subprocess.run(
        [sys.executable, "-c", _as_program(names, f"import shutil{anew}")],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    Path("/dev/shm/e2lora-canary").unlink()
    failed = {call: said for call, said in _said_of(done.stdout).items() if "got" not in said}
    assert len(outside.heard()) == len(outside.listeners)
    assert [c for c in failed if not any(part in c for part in ALSO_ELSEWHERE.split())] == []


class Ends(NamedTuple):
    reason: str
    said: str  # at its end
    program: str


RAW = """
import ctypes, mmap
memory = mmap.mmap(-1, 4096, prot=7)
memory.write(bytes.fromhex({code!r}))
call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
print(call(), flush=True)
"""
PROGRAMS: dict[str, Ends] = {
    "ends": Ends("passed", "", "import math\nassert math.gcd(4, 6) == 2"),
    "fails": Ends("failed", "AssertionError\n", "assert False"),
    "isn't Python": Ends("failed", "SyntaxError: invalid syntax\n", "def"),
    "holds what no text may": Ends("failed", "surrogates not allowed\n", "x = '\ud800'"),
    "holds a null": Ends("failed", "null bytes\n", "x = 1\0"),
    # time
    "loops": Ends("timed out", "", "while True: pass"),
    "loops, and swallows what would end it": Ends(
        "timed out",
        "",
        """
        import signal
        for number in signal.valid_signals():
            try:
                signal.signal(number, signal.SIG_IGN)
            except OSError:
                pass
        while True:
            try:
                while True: pass
            except BaseException:
                pass
        """,
    ),
    "sleeps": Ends("timed out", "", "import time\ntime.sleep(60)"),
    "waits for itself": Ends("timed out", "", "import os\nos.read(os.pipe()[0], 1)"),
    "closes all, and loops": Ends("timed out", "", "import os\nos.closerange(0, 64)\nwhile 1: 0"),
    "is made text at length": Ends(
        "timed out", "", "import sys\nsys.set_int_max_str_digits(0)\nstr(7 ** (10 ** 7))"
    ),
    # memory
    "takes memory at once": Ends("out of memory", "MemoryError\n", "bytearray(10 ** 10)"),
    "takes memory bit by bit": Ends(
        "out of memory", "MemoryError\n", "kept = []\nwhile True: kept.append([0] * 1000)"
    ),
    "maps memory": Ends("failed", "Cannot allocate memory\n", "import mmap\nmmap.mmap(-1, 2**33)"),
    "takes memory, and swallows": Ends(
        "timed out",
        "",
        """
        kept = []
        while True:
            try:
                while True: kept.append(bytearray(2 ** 20))
            except MemoryError:
                pass
        """,
    ),
    "recurses": Ends(
        "failed",
        "RecursionError: maximum recursion depth exceeded\n",
        "def f(): return f()\nf()",
    ),
    "recurses without end": Ends(
        "failed",
        "",
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda x: [x].sort(key=f)\nf(0)",
    ),
    "reads at null": Ends("failed", "", "import ctypes\nctypes.string_at(0)"),
    "aborts": Ends("failed", "", "import os\nos.abort()"),
    # output
    "prints much": Ends("wrote too much", "a" * 99, "while True: print('a' * 10 ** 5)"),
    "prints little, often": Ends("wrote too much", "", "while True: print('a' * 99, flush=True)"),
    "prints no text": Ends(
        "failed", "\ufffd\ufffd", "import os\nos.write(1, bytes([255, 254]))\nos._exit(1)"
    ),
    "writes to all it has": Ends(
        "failed",
        "locked " + "0" * 32,
        """
        import os
        for at in range(64):
            try:
                os.write(at, b"locked " + b"0" * 32)
            except OSError:
                pass
        """,
    ),
    "fills all it has": Ends(
        "timed out",
        "",
        """
        import os
        for at in range(3, 64):
            try:
                while True: os.write(at, bytes(2 ** 16))
            except OSError:
                pass
        """,
    ),
    "makes pipes without end": Ends(
        "failed", "Too many open files\n", "import os\nwhile True: os.pipe()"
    ),
    # early ends
    "exits at once": Ends("failed", "", "import os\nos._exit(0)"),
    "exits": Ends("failed", "", "import sys\nsys.exit()"),
    "exits its own way": Ends("failed", "", "class End(SystemExit): pass\nraise End(0)"),
    "exits when told to stop": Ends(
        "failed",
        "",
        """
        import os, signal
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while True: pass
        """,
    ),
    "leaves work for its exit": Ends(
        "passed", "", "import atexit, time\natexit.register(time.sleep, 60)"
    ),
    "leaves work for its exit, and fails": Ends(
        "failed", "AssertionError\n", "import atexit, os\natexit.register(os._exit, 0)\nassert 0"
    ),
    "renames its failure": Ends(
        "failed", "AssertionError\n", "import builtins\nbuiltins.AssertionError = int\nassert 0"
    ),
    "closes all, and ends": Ends("failed", "", "import os\nos.closerange(0, 64)"),
    "asks for input": Ends("failed", "EOFError: EOF when reading a line\n", "input()"),
    "looks at what is set": Ends(
        "passed",
        "['LC_CTYPE', 'PYTHONHASHSEED', 'PYTHONIOENCODING']\n",
        "import os\nprint(sorted({*os.environ, 'LC_CTYPE'}), flush=True)",
    ),
}
if platform.machine() == "x86_64":
    PROGRAMS |= {
        "calls as another architecture": Ends(  # getpid by int 0x80
            "failed", "", RAW.format(code="b814000000cd80c3")
        ),
        "calls from its own machine code": Ends(  # socket(2, 1, 0), which fails with EPERM
            "passed", "-1\n", RAW.format(code="b829000000bf02000000be0100000031d20f05c3")
        ),
    }


@pytest.fixture(scope="module")
def endings(outside: Outside, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Of all of ``PROGRAMS``, run side by side."""
    folders = tmp_path_factory.mktemp("folders")
    before, done = outside.untouched(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folders))
        ran: dict[str, Ran] = {}
        for limits, timed_out in ((QUICK, True), (AMPLE, False)):
            chosen = {
                name: textwrap.dedent(ends.program)
                for name, ends in PROGRAMS.items()
                if (ends.reason == "timed out") == timed_out
            }
            each = run_all(list(chosen.values()), limits, lambda: done.append(1))
            ran |= dict(zip(chosen, each, strict=True))
    assert len(done) == len(ran) == len(PROGRAMS)
    assert list(folders.iterdir()) == []
    assert outside.untouched() == before
    assert outside.heard() == []
    assert _processes_in(folders) == []
    return ran


def _processes_in(folder: Path) -> list[str]:
    """That are, or were until it was removed, in a folder below this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder) in os.readlink(process / "cwd"):
                found.append(process.name)
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_ends_for_this_reason(name: str, endings: dict[str, Ran]) -> None:
    ran, ends = endings[name], PROGRAMS[name]
    assert ran.reason == ends.reason, ran.said
    assert ran.said.endswith(ends.said)
    assert ran.passed == (ends.reason == "passed")


# ---- what it has ------------------------------------------------------------------------------


def test_descriptors_are_the_three_usual_ones_and_the_result_s(tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w") as secret:
        os.set_inheritable(secret.fileno(), True)
        ran = run(
            """
import os, stat
kinds = []
for at in range(64):
    try:
        kinds.append(stat.filemode(os.fstat(at).st_mode)[0])
    except OSError:
        pass
print(kinds, os.fstat(0).st_rdev == os.stat("/dev/null").st_rdev, os.getcwd(), flush=True)
"""
        )
    assert ran.said.startswith("['c', 'p', 'p', 'p'] True /")


def test_cpu_time_ends_a_program_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "PATIENCE", 1000)
    assert run("while True: pass", Limits(seconds=0.5)).reason == "timed out"


def test_clock_begins_when_a_program_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(f"import time\ntime.sleep(0.5)\n{sandbox.PROGRAM.read_text()}")
    slow.write_text(slow.read_text().replace("from __future__ import annotations\n", ""))
    monkeypatch.setattr(sandbox, "PROGRAM", slow)
    assert run("pass", Limits(seconds=0.1)).passed


def test_limits_that_the_parent_has_lowered_stay() -> None:
    code = """
import resource
from e2lora.tasks.sandbox import run
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
for few in (most, 40):
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
    print(run("import os\\nwhile True: print(os.dup(1), flush=True)").said.split("Trace")[0][-3:])
"""
    assert _python(code).split() == ["63", "39"]


FORGERIES = {
    "equals all": "class Is:\n    __eq__ = lambda *_: True\nf = Is",
    "replaces what tests call": "import builtins\nbuiltins.sorted = lambda x: 1\nf = lambda: 1",
    "takes the token": """
import os, sys
told = sys._getframe(1).f_locals["told"]
os.write(3, told["token"].encode())
os._exit(0)
""",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_program_can_lie_about_itself_as_the_documentation_says(name: str) -> None:
    assert run(f"{FORGERIES[name]}\nassert sorted([]) == f()").passed


# ---- what becomes of the parent ---------------------------------------------------------------


def test_programs_run_side_by_side_in_order_and_each_is_told_of() -> None:
    programs = [f"assert {number} % 3" for number in range(12)]
    done: list[int] = []
    ran = run_all(programs, on_done=lambda: done.append(1))
    assert [one.passed for one in ran] == [number % 3 != 0 for number in range(12)]
    assert len(done) == 12


def test_long_program_is_run() -> None:
    assert run("x = 0\n" + "# and so on\n" * 300_000 + "x += 1\nassert x == 1").passed


def test_process_that_ends_before_it_hears_is_no_failed_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other.py"
    other.write_text("raise SystemExit('a kernel of another age')")
    monkeypatch.setattr(sandbox, "PROGRAM", other)
    with pytest.raises(RuntimeError, match=r"of another age .*Use Linux 5.13.*execution='off'"):
        run("#" * 2**22)


def test_other_holder_of_the_result_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, held = os.pipe, []

    def pipe_that_a_fork_holds() -> tuple[int, int]:
        ends = pipe()
        if sys._getframe(1).f_globals["__name__"] == sandbox.__name__:
            held.append(os.dup(ends[1]))
        return ends

    def waited(*_: Any) -> None:
        raise TimeoutError("it waits for the other holder")

    monkeypatch.setattr(os, "pipe", pipe_that_a_fork_holds)
    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(30)
    try:
        assert [run("pass").reason, run("assert 0").reason] == ["passed", "failed"]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        for end in held:
            os.close(end)
    assert len(held) == 2


ENDLESS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
from e2lora.tasks.sandbox import Limits, run_all
endless = "import time\\nwhile True: time.sleep(1)"
run_all([endless] * 9, Limits(seconds=100))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_programs_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ALONE + ENDLESS],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _wait_until(lambda: any(map(_is_locked_in, _processes_in(tmp_path))))
        parent.send_signal(number)
        _, said = parent.communicate(timeout=30)
    finally:
        parent.kill()
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    _wait_until(lambda: _processes_in(tmp_path) == [])


def _is_locked_in(process: str) -> bool:
    return "Seccomp:\t2" in Path(f"/proc/{process}/status").read_text()


def _wait_until(happened: Any, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it didn't happen"
        time.sleep(0.02)


def _python(code: str) -> str:
    """What it prints."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- where it can't be had --------------------------------------------------------------------

WITHOUT = """
import ctypes, struct
LIBC = ctypes.CDLL(None, use_errno=True)
LOAD, EQUAL, RETURN, ALLOW, MISSING = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000 | 38
lines = [(LOAD, 0, 0, 0), (EQUAL, 0, 3, {number}), (LOAD, 0, 0, 16), (EQUAL, 0, 1, {first})]
lines += [(RETURN, 0, 0, MISSING), (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
assert LIBC.prctl(38, 1, 0, 0, 0) == 0
program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
assert LIBC.prctl(22, 2, program, 0, 0) == 0
from e2lora.tasks.sandbox import require_sandbox, run
for attempt in (require_sandbox, require_sandbox, lambda: run("print('run')")):
    try:
        attempt()
        print("it was run")
    except RuntimeError as error:
        print(error)
"""
LACKS = {  # system call of x86_64, and its first argument; what the error says
    "Landlock": (444, 0, "Landlock (Linux 5.13 or newer, switched on): Function not implemented"),
    "seccomp": (157, 22, "seccomp: Function not implemented"),
    "no new rights": (157, 38, "no_new_privs: Function not implemented"),
    "an end with its parent": (157, 1, "PR_SET_PDEATHSIG: Function not implemented"),
    "limits": (302, 0, "Function not implemented"),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
@pytest.mark.parametrize("lack", LACKS)
def test_machine_that_lacks_this_runs_nothing(lack: str) -> None:
    number, first, named = LACKS[lack]
    refusals = _python(WITHOUT.format(number=number, first=first)).splitlines()
    assert len(refusals) == 3
    for refusal in refusals:
        assert "in a sandbox, which this machine can't give: " in refusal
        assert named in refusal
        assert "Use Linux 5.13 or newer on x86_64 or aarch64, or execution='off'." in refusal


def test_machine_of_an_unknown_kind_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(sandboxed.Cannot, match="riscv64: known are x86_64, aarch64"):
        sandboxed.confine_syscalls()


def test_sandbox_that_does_not_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_one = tmp_path / "open.py"
    whole = sandbox.PROGRAM.read_text()
    assert "        confine_files(told" in whole
    open_one.write_text(whole.replace("        confine_files(told", "        (told"))
    monkeypatch.setattr(sandbox, "PROGRAM", open_one)
    require_sandbox.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"(?s)got out of it here: .*a file outside could be read"
    ):
        require_sandbox()
    monkeypatch.undo()
    require_sandbox()
