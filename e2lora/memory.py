"""Main memory that can still be had on this machine, or in this container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """Main memory that can still be had here.

    Args:
        root: where proc and sys lie.
    """
    machine = _meminfo((root / "proc/meminfo").read_text())
    return min([machine, *_of_control_groups(root)])


def _meminfo(text: str) -> int:
    """
    >>> _meminfo("MemTotal:  100 kB\\nMemAvailable:   80 kB\\n")
    81920
    """
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _of_control_groups(root: Path) -> Iterator[int]:
    """What each group above this process, of either version, has left; cached files don't count."""
    own = (root / "proc/self/cgroup").read_text().splitlines()
    for line in own:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        place = top / path.lstrip("/")
        for folder in (place, *place.parents):
            yield from _left_in(folder, *names)
            if folder == top:
                break
        else:
            yield from _left_in(top, *names)


def _left_in(folder: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    """Nothing of a group that isn't seen from inside a container, or has no limit."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return
    if most != "max":
        yield int(most) - used + int(stat.get(cached, 0))
