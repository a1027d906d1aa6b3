"""A hub's models and data come to a node once, and stay usable there when the hub doesn't."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from e2lora.hub import _has_weights
from tests.hub import Hub, running_hub
from tests.hub_node import Node

MODEL, DATA = "acme/tiny", "acme/films"
ROWS = [{"text": f"film {number}", "label": number % 2} for number in range(40)]
LEFT = 36  # of the rows, for training
TOKEN = "hf_opensesame"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
AT_ONCE = 5.0  # seconds; the hub's client alone tries for 23, and for each file anew


class Made(NamedTuple):
    hub: Hub
    node: Node
    models: list[Path]  # two states of one


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:
        node = Node(folder / "node", hub.url)
        models = [folder / "first", folder / "second"]
        for seed, model in enumerate(models):
            value(node.run("make", str(model), seed))
        yield Made(hub, node, models)
        node.close()


@pytest.fixture
def hub(made: Made) -> Hub:
    """With the first state of the model, its weights in other forms too, and the data set."""
    hub = made.hub
    hub.repositories.clear()
    hub.credentials.clear()
    hub.status, hub.wait, hub.wait_for_content = None, 0.0, 0.0
    hub.up()
    other_forms = ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "onnx/config.json")
    model = {**files_of(made.models[0]), **dict.fromkeys(other_forms, b"other")}
    hub.push("models", MODEL, model)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    hub.push("datasets", DATA, {"train.jsonl": lines.encode(), "README.md": b"# Films\n"})
    hub.forget_counts()
    return hub


@pytest.fixture
def node(made: Made) -> Node:
    made.node.forget()
    return made.node


@pytest.fixture
def first(made: Made) -> str:
    """The fingerprint of the model's first state, from its folder."""
    return value(made.node.run("load", str(made.models[0])))["fingerprint"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def close_to(hub: Hub, how: str) -> None:
    if how == "refused":
        hub.down()
    elif how == "status 503":
        hub.status = 503
    else:
        hub.wait = 4 * AT_ONCE


def value(answer: dict[str, Any]) -> Any:
    assert "value" in answer, answer["traceback"]
    return answer["value"]


def refusal(answer: dict[str, Any]) -> str:
    """The error's text, which came at once."""
    assert "error" in answer, answer
    assert answer["seconds"] < AT_ONCE
    return answer["error"]


# ---- once per node ----------------------------------------------------------------------------


def test_processes_of_one_node_download_weights_and_data_once(
    hub: Hub, node: Node, first: str
) -> None:
    hub.wait_for_content = 0.2  # all of them want it before one has it
    tasks = [("load", MODEL), ("rows", DATA)] * 2
    loaded, read, again, read_again = [node.start(*task) for task in tasks]
    assert value(loaded.get())["fingerprint"] == first == value(again.get())["fingerprint"]
    assert value(read.get()) == LEFT == value(read_again.get())
    repository = hub.repositories["models", MODEL].commits
    ((commit, files),) = repository.items()
    needed = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    lines = hub.repositories["datasets", DATA].commits
    ((_, data),) = lines.items()
    assert hub.sent == {
        **{f"{MODEL}/{file}": len(files[file]) for file in needed},
        **{f"{DATA}/{file}": len(data[file]) for file in data},
    }
    assert value(loaded.get())["name"] == MODEL
    assert value(loaded.get())["commit"] == commit


def test_preflight_fetches_no_weights_and_staging_does(hub: Hub, node: Node) -> None:
    assert value(node.run("structure", MODEL)) == 2
    assert value(node.run("check", MODEL, DATA, False)) == []
    weights = f"{MODEL}/model.safetensors"
    assert weights not in hub.sent
    assert value(node.run("check", MODEL, DATA, True)) == []
    assert hub.sent[weights] > 0


# ---- a hub that is away -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["refused", "status 503", "silent"])
def test_staged_node_goes_on_at_once_without_the_hub(
    how: str, hub: Hub, node: Node, first: str
) -> None:
    assert value(node.run("check", MODEL, DATA, True)) == []
    close_to(hub, how)
    hub.forget_counts()
    loaded = node.run("load", MODEL, None, 0.3 if how == "silent" else None)
    assert value(loaded)["fingerprint"] == first
    answers = [loaded]
    if how != "silent":  # it would be waited for, which the default does for 10 s
        answers += [node.run("rows", DATA), node.run("check", MODEL, DATA, True)]
        assert [value(answer) for answer in answers[1:]] == [LEFT, []]
    assert max(answer["seconds"] for answer in answers) < AT_ONCE
    assert hub.asked.total() <= len(answers), "one look at the hub for each process"


@pytest.mark.parametrize("how", ["forked", pytest.param("started", marks=pytest.mark.slow)])
def test_offline_node_uses_what_was_staged_and_asks_nothing(
    how: str, hub: Hub, node: Node, first: str, tmp_path: Path
) -> None:
    offline = node
    if how == "started":  # the libraries read the variable themselves
        offline = Node(tmp_path / "offline", hub.url, **OFFLINE)
    assert "HF_HUB_OFFLINE" in refusal(offline.run("load", MODEL, env=OFFLINE))
    assert "HF_HUB_OFFLINE" in refusal(offline.run("rows", DATA, env=OFFLINE))
    assert value(node.run("check", MODEL, DATA, True)) == []
    if how == "started":
        offline.forget()
        node.caches.rename(offline.caches)
    hub.forget_counts()
    assert value(offline.run("load", MODEL, env=OFFLINE))["fingerprint"] == first
    assert value(offline.run("rows", DATA, env=OFFLINE)) == LEFT
    assert value(offline.run("check", MODEL, DATA, True, env=OFFLINE)) == []
    assert hub.asked.total() == 0
    if how == "started":
        offline.close()


@pytest.mark.parametrize("how", ["refused", "status 503"])
def test_nothing_staged_and_no_hub_is_a_clear_error_at_once(how: str, hub: Hub, node: Node) -> None:
    close_to(hub, how)
    for task, name in (("load", MODEL), ("structure", MODEL), ("rows", DATA)):
        message = refusal(node.run(task, name))
        assert f"got {name!r}" in message
        assert ("can't be reached" if how == "refused" else "answers with 503") in message
        assert "jobs/doctor.py --stage" in message
        assert "E2LORA_MIRROR" in message


def test_hub_that_is_back_is_used(hub: Hub, node: Node, first: str) -> None:
    hub.down()
    refusal(node.run("load", MODEL))
    hub.up()
    assert value(node.run("load", MODEL))["fingerprint"] == first


def test_weights_that_came_in_part_are_not_whole(tmp_path: Path) -> None:
    parts = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (tmp_path / parts["a"]).touch()
    assert not _has_weights(tmp_path)
    (tmp_path / parts["b"]).touch()
    assert _has_weights(tmp_path)


# ---- gated, absent, changed -------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "hf_ofsomeoneelse"])
def test_gated_model_and_data_are_refused_at_once_with_the_remedy(
    token: str | None, hub: Hub, node: Node
) -> None:
    for repository in hub.repositories.values():
        repository.token = TOKEN
    env = {"HF_TOKEN": token} if token else {}
    for task, name, page in (("load", MODEL, MODEL), ("rows", DATA, f"datasets/{DATA}")):
        answer = node.run(task, name, env=env)
        message = refusal(answer)
        for part in (f"got {name!r}", "gated", f"Ask for access on {hub.url}/{page}", "HF_TOKEN"):
            assert part in message
        assert "hf auth login" in message
        assert token is None or token not in answer["traceback"]
    assert hub.credentials == ({f"Bearer {token}"} if token else set())


def test_gated_model_and_data_come_with_a_token_from_a_file_or_the_environment(
    hub: Hub, node: Node, first: str
) -> None:
    for repository in hub.repositories.values():
        repository.token = TOKEN
    assert value(node.run("rows", DATA, env={"HF_TOKEN": TOKEN})) == LEFT
    node.caches.mkdir(exist_ok=True)
    (node.caches / "token").write_text(TOKEN)
    assert value(node.run("load", MODEL))["fingerprint"] == first
    assert hub.credentials == {f"Bearer {TOKEN}"}


def test_what_came_before_the_token_was_lost_is_still_used(
    hub: Hub, node: Node, first: str
) -> None:
    for repository in hub.repositories.values():
        repository.token = TOKEN
    assert "error" not in node.run("load", MODEL, env={"HF_TOKEN": TOKEN})
    assert value(node.run("load", MODEL))["fingerprint"] == first
    del hub.repositories["models", MODEL]
    assert value(node.run("load", MODEL))["fingerprint"] == first


def test_what_the_hub_does_not_have_is_a_clear_error(hub: Hub, node: Node) -> None:
    assert "got 'acme/none'" in refusal(node.run("load", "acme/none"))
    assert "got 'acme/none'" in refusal(node.run("rows", "acme/none"))
    message = refusal(node.run("load", MODEL, "v7"))
    assert "at 'v7'" in message
    assert "as `revision`" in message


def test_pinned_revision_is_honoured_and_an_unpinned_name_follows_the_hub(
    hub: Hub, node: Node, first: str, made: Made
) -> None:
    (old,) = hub.repositories["models", MODEL].commits
    assert value(node.run("load", MODEL))["fingerprint"] == first
    hub.push("models", MODEL, files_of(made.models[1]))
    second = value(node.run("load", MODEL))["fingerprint"]
    assert second == value(node.run("load", str(made.models[1])))["fingerprint"] != first
    assert value(node.run("load", MODEL, old))["fingerprint"] == first
    hub.down()
    assert value(node.run("load", MODEL, old))["fingerprint"] == first
    assert value(node.run("load", MODEL))["fingerprint"] == second
