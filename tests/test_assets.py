"""Names become local files: once, whole, and checked."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from e2lora import assets
from e2lora.assets import COMPLETE, DEMO_ASSETS, mirrored, resolve, unzip_folder


def rows_of(folder: str, split: str) -> list[dict]:
    lines = (Path(folder) / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.fixture
def fake_demo(tmp_path, monkeypatch):
    """``demo:fake`` in an empty cache, its download replaced; yields the calls made."""
    calls = []

    def download(name, asset, folder):
        calls.append(name)
        return folder

    def unpack(distribution, folder):
        (folder / "content").write_text("whole")

    asset = dataclasses.replace(DEMO_ASSETS["demo:vader"], unpack=unpack)
    monkeypatch.setenv("E2LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(DEMO_ASSETS, "demo:fake", asset)
    monkeypatch.setattr(assets, "_download", download)
    return calls


def test_hub_names_pass_and_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    assert resolve("organisation/model") == "organisation/model"
    assert resolve("rows.jsonl") == resolve("./rows.jsonl") == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent/e2lora", "absent.csv"])
def test_missing_path_is_an_error_and_not_taken_for_a_hub_name(name):
    with pytest.raises(FileNotFoundError, match=r"must exist; got '.*absent.*Correct the path"):
        resolve(name)


def test_unknown_demo_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'demo:minilm-l6', 'demo:vader'.*got 'demo:vadr'"):
        resolve("demo:vadr")


def test_demo_model_is_a_transformers_folder():
    from transformers import AutoConfig, AutoTokenizer

    folder = resolve("demo:minilm-l6")
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 6, 384)
    assert AutoTokenizer.from_pretrained(folder).tokenize("Hello") == ["hello"]
    assert (Path(folder) / "model.safetensors").stat().st_size > 90_000_000


def test_demo_data_is_split_by_document_and_balanced():
    train, test = (rows_of(resolve("demo:vader"), split) for split in ("train", "test"))
    assert len(train) + len(test) == 23_619  # 23 703 published rows, less 84 repeated texts
    assert 0.18 < len(test) / (len(train) + len(test)) < 0.22
    for rows in (train, test):
        assert 0.45 < sum(row["label"] for row in rows) / len(rows) < 0.6
        assert len({row["domain"] for row in rows}) == 4
        assert all(row["text"] and -4 <= row["score"] <= 4 for row in rows)
        assert all(row["label"] == (row["score"] > 0) for row in rows)
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert not any("\ufffd" in row["text"] or "Ã" in row["text"] for row in train + test)


def test_demo_data_is_downloaded_and_made_anew_byte_for_byte(tmp_path, monkeypatch):
    usual = resolve("demo:vader")
    monkeypatch.setenv("E2LORA_CACHE", str(tmp_path))
    again = resolve("demo:vader")
    assert again != usual
    for split in ("train.jsonl", "test.jsonl"):
        assert (Path(again) / split).read_bytes() == (Path(usual) / split).read_bytes()


def test_another_hash_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    other = dataclasses.replace(DEMO_ASSETS["demo:vader"], sha256="0" * 64)
    monkeypatch.setitem(DEMO_ASSETS, "demo:vader", other)
    monkeypatch.setenv("E2LORA_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"HASHES.*Expected sha256 000000.*name your own"):
        resolve("demo:vader")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_failed_download_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("E2LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(assets.sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"pip download.*vaderSentiment.*Check the network"):
        resolve("demo:vader")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder that holds ``organisation/model`` and ``alone``, in an otherwise empty one."""
    for name in ("organisation/model", "alone"):
        (tmp_path / "mirror" / name).mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("E2LORA_MIRROR", str(tmp_path / "mirror"))
    assets._tell_once.cache_clear()
    return tmp_path / "mirror"


def test_hub_names_are_found_in_the_mirror_and_that_is_told_once(mirror, capsys):
    for _ in range(2):
        assert resolve("organisation/model") == str(mirror / "organisation" / "model")
    told = capsys.readouterr().err
    assert told == f"organisation/model is taken from the mirror, {mirror}/organisation/model\n"
    assert resolve("alone") == str(mirror / "alone")


def test_what_the_mirror_lacks_is_left_to_the_hub(mirror, capsys, monkeypatch):
    assert resolve("organisation/other") == "organisation/other"
    assert not capsys.readouterr().err
    monkeypatch.setenv("E2LORA_MIRROR", "")
    assert resolve("organisation/model") == "organisation/model"


def test_local_paths_are_not_looked_for_in_the_mirror(mirror, fake_demo):
    local = mirror.parent / "here" / "organisation" / "model"
    local.mkdir(parents=True)
    assert resolve("organisation/model") == str(local)
    assert mirrored("organisation/model") is None
    assert "cache" in resolve("demo:fake")
    for name in ("../mirror/absent", "organisation/../../mirror/alone", "organisation/.hidden"):
        assert mirrored(name) is None


def test_mirror_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("E2LORA_MIRROR", "/absent/mirror")
    with pytest.raises(FileNotFoundError, match=r"every node; got '/absent/mirror'\. Correct"):
        resolve("organisation/model")


def test_second_call_does_nothing(fake_demo):
    assert resolve("demo:fake") == resolve("demo:fake")
    assert fake_demo == ["demo:fake"]


def test_half_finished_folder_is_redone(fake_demo):
    folder = Path(resolve("demo:fake"))
    (folder / COMPLETE).unlink()
    (folder / "content").write_text("ha")
    (folder / "stray").write_text("")
    resolve("demo:fake")
    assert (folder / "content").read_text() == "whole"
    assert not (folder / "stray").exists()


def test_concurrent_callers_share_one_download(fake_demo):
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(resolve, ["demo:fake"] * 8))
    assert len(folders) == len(fake_demo) == 1


@pytest.mark.parametrize("member", ["model/../../evil", "model//evil", "model/a/../../../evil"])
def test_archive_member_outside_of_the_folder_is_refused(tmp_path, member):
    archive, folder = tmp_path / "archive.zip", tmp_path / "folder"
    folder.mkdir()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(member, "x")
    with pytest.raises(ValueError, match="must stay inside"):
        unzip_folder(archive, "model/", folder)
    assert not list(tmp_path.rglob("evil"))
