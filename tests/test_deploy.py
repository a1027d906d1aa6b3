"""What describes clusters, images and packages of jobs fits Ray, KubeRay and this project."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCHED = ("cluster.yaml", "deploy/gcp.yaml")
RAYJOB = "deploy/kuberay/rayjob.yaml"
STUDY = "python jobs/search.py --space my_study --storage /shared/studies"
SYNCED = {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
SYNCED |= {"e2lora", "jobs", "search_spaces"}


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


# --- ray up -------------------------------------------------------------------------------------


def accepted(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does before it turns to the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(config)
    validate_config(config)
    return config


@pytest.fixture(params=LAUNCHED)
def launched(request: pytest.FixtureRequest) -> dict[str, Any]:
    return accepted(yaml.safe_load((ROOT / request.param).read_text()))


def workers_of(config: dict[str, Any]) -> dict[str, Any]:
    types = config["available_node_types"]
    return {name: of for name, of in types.items() if name != config["head_node_type"]}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"max_wrokers": 3}, "max_wrokers"),
        ({"max_workers": "ten"}, "not of type 'integer'"),
        ({"max_workers": 0}, "smaller than the sum"),
        ({"head_node_type": "haed"}, "must be one of"),
        ({"available_node_types": {"head": {"resources": {}}}}, "node_config"),
    ],
)
@pytest.mark.parametrize("file", LAUNCHED)
def test_ray_up_refuses_a_broken_one(file: str, change: dict[str, Any], complaint: str) -> None:
    config = yaml.safe_load((ROOT / file).read_text()) | change
    with pytest.raises(Exception, match=complaint):
        accepted(config)


def test_no_trial_runs_on_the_head(
    launched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    head = launched["available_node_types"][launched["head_node_type"]]
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps(head["resources"]))  # as `ray up` does
    has = ResourceAndLabelSpec().resolve(is_head=True, node_ip_address="127.0.0.1")
    assert not {"CPU", "GPU"} & {name for name, amount in has.to_resource_dict().items() if amount}
    assert "node:__internal_head__" in has.to_resource_dict()
    assert head["max_workers"] == 0


def test_gpu_workers_come_and_go_on_spot_capacity(launched: dict[str, Any]) -> None:
    workers = workers_of(launched)
    for of in workers.values():
        assert 0 <= of["min_workers"] < of["max_workers"] <= launched["max_workers"]
    assert any(of["min_workers"] for of in workers.values())
    assert 5 <= launched["idle_timeout_minutes"] <= 60
    head = launched["available_node_types"][launched["head_node_type"]]["node_config"]
    if launched["provider"]["type"] == "aws":
        assert "InstanceMarketOptions" not in head
        for of in workers.values():  # names: EC2's RunInstances
            assert of["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
            assert of["node_config"]["InstanceType"].startswith(("g5", "g6", "p4", "p5"))
        assert launched["provider"]["cache_stopped_nodes"] is False
        zones = launched["provider"]["availability_zone"].split(",")
        assert all(zone[:-1] == launched["provider"]["region"] for zone in zones)
        assert f".efs.{launched['provider']['region']}." in launched["metadata"]["mount"]
    else:
        assert "scheduling" not in head
        has = {"g2-standard-8": {"CPU": 8, "GPU": 1}, "g2-standard-48": {"CPU": 48, "GPU": 4}}
        for of in workers.values():  # names: Compute Engine's instances.insert
            assert of["node_config"]["scheduling"] == {
                "provisioningModel": "SPOT",
                "instanceTerminationAction": "DELETE",
                "automaticRestart": False,
                "onHostMaintenance": "TERMINATE",
            }
            assert of["resources"] == has[of["node_config"]["machineType"]]
        zone, region = (launched["provider"][key] for key in ("availability_zone", "region"))
        assert zone.rpartition("-")[0] == region


def test_nodes_get_the_versions_of_constraints_and_what_is_needed_to_install(
    launched: dict[str, Any],
) -> None:
    mounts = launched["file_mounts"]
    ours = {local for local in mounts.values() if not local.startswith("~")}
    assert ours == SYNCED
    assert all(mounts[f"~/e2lora/{local}"] == local and (ROOT / local).exists() for local in ours)
    commands = [*launched["head_setup_commands"], *launched["worker_setup_commands"]]
    installs = [command for command in commands if "uv pip install" in command]
    assert len(installs) == 3  # packages on both, the cloud's own on the head
    assert all("cd ~/e2lora &&" in line for line in installs)
    assert all("--constraint constraints.txt" in line for line in installs)
    assert not [line for line in commands if re.search(r"[=<>~]=\s*\d|\.whl|@ ", line)]
    assert [line for line in commands if "--python 3.11" in line]
    for line in [*commands, *launched["head_start_ray_commands"]]:
        subprocess.run(["bash", "-n", "-c", line], check=True)


def test_shell_of_a_node_is_set_up_once(launched: dict[str, Any], tmp_path: Path) -> None:
    (line,) = (line for line in launched["worker_setup_commands"] if ".bashrc" in line)
    (tmp_path / ".bashrc").touch()
    for _ in range(2):
        subprocess.run(["bash", "-c", line], check=True, env={"HOME": str(tmp_path)}, timeout=10)
    shown = subprocess.run(
        ["/bin/bash", "-c", "source ~/.bashrc && echo $RAY_AUTH_MODE $PATH"],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=10,
    ).stdout.strip()
    assert shown == f"token {tmp_path}/venv/bin:/usr/bin:/bin"


def test_ray_starts_with_a_token_and_a_dashboard_on_loopback(launched: dict[str, Any]) -> None:
    known = Path(ray.__file__).with_name("scripts").joinpath("scripts.py").read_text()
    assert launched["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    options = {}
    for kind in ("head", "worker"):
        command = launched[f"{kind}_start_ray_commands"][-1]
        assert "; RAY_AUTH_MODE=token ray start " in command
        options[kind] = set(command.split(" ray start ")[1].split())
        for option in options[kind]:
            assert f'"{option.split("=")[0]}"' in known, option
    assert options["head"] > {"--head", "--port=6379", "--dashboard-host=127.0.0.1"}
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in options["head"]
    assert "--address=$RAY_HEAD_IP:6379" in options["worker"]


def test_all_name_the_same_storage(launched: dict[str, Any]) -> None:
    for kind in ("head", "worker"):
        commands = launched[f"{kind}_setup_commands"]
        (mount,) = (line for line in commands if "sudo mount" in line)
        assert mount == launched["metadata"]["mount"]
        assert mount.split()[:3] == ["mountpoint", "-q", "/shared"]
        assert mount.endswith((":/ /shared", ":/shared /shared"))
    for page in ("README.md", "docs/cluster.md"):
        text = re.sub(r"\s*\\\n\s*", " ", (ROOT / page).read_text())
        assert f"-- {STUDY}" in text, page
    assert rayjob()["spec"]["entrypoint"] == STUDY


# --- Kubernetes ---------------------------------------------------------------------------------


def manifests() -> tuple[dict[str, Any], dict[str, Any]]:
    claim, job = yaml.safe_load_all((ROOT / RAYJOB).read_text())
    return claim, job


def rayjob() -> dict[str, Any]:
    return manifests()[1]


FACTS = json.loads((ROOT / "tests" / "kuberay_fields.json").read_text())
HEAD = ("rayClusterSpec", "headGroupSpec", "template", "spec")
PYTHON = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}


def faults(value: Any, table: str, path: str = "") -> Iterator[str]:
    """Where a manifest departs from the published definition, field by field."""
    facts = FACTS[table]
    kind = facts["types"].get(path)
    if kind is None:
        yield f"{table} {path}: no such field"
    elif kind == "quantity":
        if not re.fullmatch(FACTS["quantity"], str(value)):
            yield f"{table} {path}: {value!r} is no quantity"
    elif kind in FACTS:
        yield from faults(value, kind)
    elif type(value) is not PYTHON[kind]:
        yield f"{table} {path}: {value!r} is no {kind}"
    elif path in facts["enums"] and value not in facts["enums"][path]:
        yield f"{table} {path}: {value!r} is none of {facts['enums'][path]}"
    elif kind == "array":
        for item in value:
            yield from faults(item, table, f"{path}[]")
    elif kind == "object":
        for name in set(facts["required"].get(path, ())) - set(value):
            yield f"{table} {path}: lacks {name}"
        anything = f"{path}.*" in facts["types"]
        for name, inner in value.items():
            at = "*" if anything else name
            yield from faults(inner, table, f"{path}.{at}" if path else at)


def test_every_field_is_one_of_kuberays() -> None:
    claim, job = manifests()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert not list(faults({k: v for k, v in job.items() if k != "metadata"}, "RayJob"))
    assert not list(faults({"spec": claim["spec"]}, "PersistentVolumeClaim"))
    for page in (RAYJOB, "docs/cluster.md"):
        assert FACTS["source"]["release"] in (ROOT / page).read_text()


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("submissionMode",), "K8SJobMode", "none of"),
        (("backoffLimit",), "3", "no integer"),
        (("rayClusterSpec", "enableInTreeAutoscaler"), True, "no such field"),
        (("rayClusterSpec", "authOptions", "mode"), "tokens", "none of"),
        (("rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "no string"),
        (("rayClusterSpec", "workerGroupSpecs", 0, "groupName"), None, "lacks groupName"),
        (
            (*HEAD, "containers", 0, "resources", "limits", "memory"),
            "16GB",
            "no quantity",
        ),
    ],
)
def test_a_wrong_field_is_found(path: tuple[Any, ...], value: Any, complaint: str) -> None:
    job = yaml.safe_load(json.dumps({"spec": rayjob()["spec"]}))  # no two places are one object
    at = job["spec"]
    for name in path[:-1]:
        at = at[name]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    (fault,) = faults(job, "RayJob")
    assert complaint in fault


def test_rayjob_keeps_what_kuberay_asks_beyond_types_and_trains_on_workers_only() -> None:
    """The operator's own checks in that release: controllers/ray/utils/validation.go."""
    claim, job = manifests()
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"])
    assert spec["shutdownAfterJobFinishes"], "a ttl needs it"
    assert spec["backoffLimit"] > 0
    assert "clusterSelector" not in spec
    assert cluster["rayVersion"] == pinned("ray")
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0), "tokens need it"
    (gpu,) = cluster["workerGroupSpecs"]
    assert 1 <= gpu["minReplicas"] <= gpu["replicas"] < gpu["maxReplicas"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    images = set()
    (user,) = re.findall(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for group in (cluster["headGroupSpec"], gpu):
        pod = group["template"]["spec"]
        assert "restartPolicy" not in pod, "the autoscaler's second version makes pods anew"
        (container,) = pod["containers"]
        images.add(container["image"])
        places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert places.keys() == volumes.keys()
        assert places["shared"] == "/shared"
        claimed = volumes["shared"]["persistentVolumeClaim"]["claimName"]
        assert claimed == claim["metadata"]["name"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (group is gpu)
        assert pod["securityContext"]["runAsUser"] == int(user)
    assert len(images) == 1
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


# --- secrets ------------------------------------------------------------------------------------


def test_secrets_come_from_the_platform_and_stand_in_no_file() -> None:
    from ray.runtime_env import RuntimeEnv

    cluster = rayjob()["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    named = [
        variable
        for group in groups
        for container in group["template"]["spec"]["containers"]
        for variable in container["env"]
        if re.search("TOKEN|PASSWORD|USERNAME|SECRET|KEY", variable["name"])
    ]
    assert len(named) == 4
    for variable in named:
        if not variable["name"].endswith("_PATH"):
            assert list(variable["valueFrom"]) == ["secretKeyRef"]
    assert "runtimeEnvYAML" not in rayjob()["spec"]
    environment = yaml.safe_load((ROOT / "deploy/runtime_env.yaml").read_text())
    assert RuntimeEnv(**environment).env_vars() == environment["env_vars"]
    assert not [
        name for name in environment["env_vars"] if re.search("TOKEN|PASS|SECRET|KEY|USER", name)
    ]
    secret = re.compile(r"hf_\w{20}|AKIA\w{12}|BEGIN [A-Z ]*PRIVATE|//[^/\s:]+:[^/\s@]+@")
    for file in (*LAUNCHED, RAYJOB, "deploy/runtime_env.yaml", "Dockerfile", "docs/cluster.md"):
        assert not secret.search((ROOT / file).read_text()), file
