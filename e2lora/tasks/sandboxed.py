"""Runs one untrusted program, after this process has locked itself in. A script of its own.

What it is told stands on stdin, as JSON. To the result's descriptor goes ``LOCKED`` before the
program begins, and the token once it has run to its end. Before the program's first line:

* it ends with the process that started it;
* Landlock (Linux 5.13): files are read below ``readable`` only, none is written or made, not even
  in the empty folder that it is in;
* seccomp: system calls that aren't listed here fail, so there is no network, no other process or
  thread, no signal to others, no tracing, no mounting, no changing of limits, modes and owners;
* capabilities are dropped, limits on time, memory, files and descriptors set.

It imports nothing but the standard library, and exits with :data:`CANNOT` where one of these can't
be had: the program is never run without them.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

CANNOT = 97  # exit status; the program's own, if behind LOCKED
LOCKED = b"locked "
RESULT = 3  # descriptor of what is told of the program

# system call → its number on x86_64 and aarch64 (None: doesn't exist there)
SYSCALLS: dict[str, tuple[int | None, int | None]] = {
    # files: which, Landlock says
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "lseek": (8, 62),
    "open": (2, None),
    "openat": (257, 56),
    "close": (3, 57),
    "stat": (4, None),
    "lstat": (6, None),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getdents64": (217, 61),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    # memory
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    # time
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    # the process itself
    "exit": (60, 93),
    "exit_group": (231, 94),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrandom": (318, 278),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "futex": (202, 98),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # place above, AUDIT_ARCH

# system call → which of its arguments must have none of these bits, or be one of these commands
NO_BITS = {"open": 1, "openat": 2}
WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)
COMMANDS = {
    "fcntl": (1, (0, 1, 2, 3, 1030)),  # no signals to owners of descriptors: F_SETOWN, O_ASYNC
    "ioctl": (1, (0x5401, 0x5450, 0x5451)),  # whether it is a terminal; closed on exec
}

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 4, 38, 22
SECCOMP_MODE_FILTER = 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
ACCESSES = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}  # by Landlock's version

LIBC = ctypes.CDLL(None, use_errno=True)


class Cannot(Exception):
    """Something that protects is not to be had."""


def main() -> None:
    told = json.loads(sys.stdin.buffer.read())
    try:
        end_with_parent(told["parent"])
        if told["result"] != RESULT:  # a number as high as the parent has descriptors
            os.dup2(told["result"], RESULT)
            os.close(told["result"])
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        limit(told["limits"])
        drop_capabilities()
        _checked("dumpable", LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))  # no core, by no pipe either
        _checked("no_new_privs", LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        confine_files(told["readable"])
        confine_syscalls()
    except (Cannot, OSError) as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(CANNOT)
    os.write(RESULT, LOCKED)
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    # Without this file's own `from __future__ import annotations`.
    exec(compile(told["program"], "program", "exec", dont_inherit=True), scope)
    os.write(RESULT, told["token"].encode())
    os._exit(0)  # what the program left for its exit is not run


def end_with_parent(parent: int) -> None:
    """Killed when the thread that started this process ends, however it does."""
    _checked("PR_SET_PDEATHSIG", LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)  # it had ended before


def limit(limits: dict[str, int]) -> None:
    """Hard limits, by the names of the resource module; a lower one that it was born with stays."""
    for name, most in limits.items():
        kind = getattr(resource, name)
        _, born_with = resource.getrlimit(kind)
        if born_with != resource.RLIM_INFINITY:
            most = min(most, born_with)
        resource.setrlimit(kind, (most, most))


def drop_capabilities() -> None:
    """Also of root, who could raise limits again and read what others own."""
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process
    _checked("capset", LIBC.capset(header, bytes(24)))


def confine_files(readable: list[str]) -> None:
    """By Landlock, as much as this kernel's version knows."""
    version = LIBC.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise Cannot(f"Landlock (Linux 5.13 or newer, switched on): {_errno()}")
    handled = ACCESSES[min(version, 5)]
    attributes = struct.pack("=QQQ", handled, 0b11, 0b11)  # files; TCP; signals, abstract sockets
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = LIBC.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        raise Cannot(f"a Landlock ruleset: {_errno()}")
    for path in readable:
        access = READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
        _allow(ruleset, path, access & handled)
    _checked("landlock_restrict_self", LIBC.syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", access, place)
    _checked(f"landlock_add_rule {path}", LIBC.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0))
    os.close(place)


def confine_syscalls() -> None:
    """By seccomp: what isn't in ``SYSCALLS`` fails (EPERM); another architecture's calls kill."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise Cannot(f"a list of system calls for {machine}: known are {', '.join(MACHINES)}")
    place, architecture = MACHINES[machine]
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    load, equal, any_bit, ret = 0x20, 0x15, 0x45, 0x06
    lines = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (ret, 0, 0, kill),
        (load, 0, 0, 0),
    ]
    for name, numbers in SYSCALLS.items():
        number = numbers[place]
        if number is None:
            continue
        then = [(ret, 0, 0, allow)]
        if name in NO_BITS:  # an argument's lower half lies at 16 + 8 × its place
            then = [(load, 0, 0, 16 + 8 * NO_BITS[name]), (any_bit, 1, 0, WRITING), *then]
            then += [(ret, 0, 0, refuse)]
        if name in COMMANDS:
            argument, commands = COMMANDS[name]
            tried = [line for c in commands for line in ((equal, 0, 1, c), (ret, 0, 0, allow))]
            then = [(load, 0, 0, 16 + 8 * argument), *tried, (ret, 0, 0, refuse)]
        lines += [(equal, 0, len(then), number), *then]
    lines.append((ret, 0, 0, refuse))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
    _checked("seccomp", LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0))


def _checked(what: str, status: int) -> None:
    if status != 0:
        raise Cannot(f"{what}: {_errno()}")


def _errno() -> str:
    return os.strerror(ctypes.get_errno())


if __name__ == "__main__":
    main()
