"""Memory that is left: by made-up files of a system, and by this machine's own."""

from __future__ import annotations

from pathlib import Path

from e2lora.memory import available_bytes


def system(root: Path, cgroup: str, files: dict[str, str], available_kb: int = 8_000) -> Path:
    written = {
        "proc/meminfo": f"MemTotal: 16000 kB\nMemAvailable: {available_kb} kB\n",
        "proc/self/cgroup": cgroup,
        **files,
    }
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(limit: str, used: int, cached: int) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon {used - cached}\ninactive_file {cached}\n",
    }


def within(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in files.items()}


def test_machine_without_groups_has_what_is_available(tmp_path: Path) -> None:
    assert available_bytes(system(tmp_path, "", {})) == 8_000 * 1024


def test_limit_of_the_own_group_counts_and_cached_files_do_not(tmp_path: Path) -> None:
    files = within("a/b/", v2("3000000", used=1_000_000, cached=400_000))
    assert available_bytes(system(tmp_path, "0::/a/b\n", files)) == 2_400_000


def test_smallest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    files = within("a/b/", v2("max", 10, 0)) | within("a/", v2("500000", 100_000, 0))
    assert available_bytes(system(tmp_path, "0::/a/b\n", files)) == 400_000


def test_group_that_a_container_does_not_see_is_looked_for_at_the_top(tmp_path: Path) -> None:
    files = within("", v2("700000", 200_000, 0))
    assert available_bytes(system(tmp_path, "0::/docker/123\n", files)) == 500_000


def test_groups_of_version_one_count_too(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "900000",
        "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "300000",
        "sys/fs/cgroup/memory/x/memory.stat": "total_inactive_file 100000\n",
    }
    cgroup = "5:cpu,cpuacct:/y\n4:memory:/x\n"
    assert available_bytes(system(tmp_path, cgroup, files)) == 700_000


def test_this_machine_tells_what_it_has() -> None:
    assert 2**20 < available_bytes() < 2**50
