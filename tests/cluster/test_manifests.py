"""The files of cluster/: their structure, their security, and that the job in them fits the nodes in them.

Nothing here has been applied to a cluster. KubeRay's schemas are in kuberay_crds.json (reduce_crd.py says how); Ray's
launcher file goes through Ray's own checks; the job goes through ours.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from raydistill.config import apply_overrides
from raydistill.errors import PlacementError
from raydistill.runtime.room import check_room
from raydistill.runtime.settings import RunConfig, validate
from tests.cluster.reduce_crd import reduce_schema, shared

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = json.loads(Path(__file__).with_name("kuberay_crds.json").read_text())
PART_OF = {"app.kubernetes.io/part-of": "raydistill"}
VOLUME = "raydistill-runs"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def manifest(kind: str) -> dict[str, Any]:
    (found,) = documents(f"{kind.lower()}.yaml")
    assert found["kind"] == kind
    return found


def complaints(part: dict[str, Any], schema: dict[str, Any] | str) -> list[str]:
    """What `part` has that the schema, or the CRD of this kind, does not describe, and the other way round."""
    if isinstance(schema, str):
        schema = {"$ref": f"#/$defs/{schema}"}
    checker = jsonschema.Draft202012Validator(schema | {"$defs": SCHEMAS["$defs"]})
    return [f"{error.json_path}: {error.message}" for error in checker.iter_errors(part)]


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def pod_templates(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    spec = cluster_spec(manifest)
    yield "head", spec["headGroupSpec"]["template"]
    yield from ((group["groupName"], group["template"]) for group in spec["workerGroupSpecs"])
    if manifest["kind"] == "RayJob":
        yield "submitter", manifest["spec"]["submitterPodTemplate"]


def containers(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, template in pod_templates(manifest):
        yield from ((f"{name}/{each['name']}", each) for each in template["spec"]["containers"])
    yield "autoscaler", cluster_spec(manifest)["autoscalerOptions"]


def nodes(replicas: str = "minReplicas") -> list[dict[str, float]]:
    """Ray's resources of the RayJob's worker nodes: KubeRay takes them from the container's limits."""
    found = []
    for group in cluster_spec(manifest("RayJob"))["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        node = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
        found += [node] * group[replicas]
    return found


def entrypoint() -> list[str]:
    return shlex.split(manifest("RayJob")["spec"]["entrypoint"])


def job_config(*more: str) -> RunConfig:
    python, script, *overrides = entrypoint()
    assert python == "python"
    spec = importlib.util.spec_from_file_location("entrypoint", ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    config: RunConfig = apply_overrides(job.recipe(), [*overrides, *more])
    return config


def set_in(manifest: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    for step in way:
        manifest = manifest[int(step) if isinstance(manifest, list) else step]
    if value is None:
        del manifest[last]
    else:
        manifest[last] = value


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_a_manifest_is_what_kuberay_describes(kind: str) -> None:
    assert complaints(manifest(kind), kind) == []


CLUSTER_PATH = {"RayCluster": "spec", "RayJob": "spec.rayClusterSpec"}


@pytest.mark.parametrize("kind", list(CLUSTER_PATH))
@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("authOption", {"mode": "token"}, "'authOption' was unexpected"),
        ("authOptions.mode", "tokens", "'tokens' is not one of"),
        ("autoscalerOptions.version", "v3", "'v3' is not one of"),
        ("headGroupSpec", None, "'headGroupSpec' is a required property"),
        ("headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        ("headGroupSpec.template.spec.securityContext.runAsNonroot", True, "'runAsNonroot' was unexpected"),
        ("workerGroupSpecs.0.minReplicas", "2", "'2' is not of type 'integer'"),
        ("workerGroupSpecs.0.groupName", None, "'groupName' is a required property"),
        ("workerGroupSpecs.1.template.spec.container", [], "'container' was unexpected"),
        ("workerGroupSpecs.1.template.spec.containers.0.name", None, "'name' is a required property"),
        ("workerGroupSpecs.1.template.spec.containers.0.resources.limits.cpu", [3], "is not of type"),
        ("workerGroupSpecs.1.template.spec.volumes.0.persistentVolumeClaim.claim", "x", "was unexpected"),
    ],
)
def test_a_broken_cluster_is_refused(kind: str, path: str, value: Any, complaint: str) -> None:
    # a copy through JSON: YAML's aliases are one object in several places
    broken = json.loads(json.dumps(manifest(kind)))
    set_in(broken, f"{CLUSTER_PATH[kind]}.{path}", value)
    found = complaints(broken, kind)
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("kind", "RayJobs", "'RayJobs' is not one of"),
        ("apiVersion", "ray.io/v1alpha1", "is not one of"),
        ("spec", None, "'spec' is a required property"),
        ("spec.entryPoint", "python", "'entryPoint' was unexpected"),
        ("spec.backoffLimit", 1.5, "1.5 is not of type 'integer'"),
        ("spec.shutdownAfterJobFinishes", "true", "is not of type 'boolean'"),
        ("spec.submitterPodTemplate.spec.containers", None, "'containers' is a required property"),
    ],
)
def test_a_broken_job_is_refused(path: str, value: Any, complaint: str) -> None:
    broken = json.loads(json.dumps(manifest("RayJob")))
    set_in(broken, path, value)
    found = complaints(broken, "RayJob")
    assert len(found) == 1, found
    assert complaint in found[0]


def test_reduced_a_schema_refuses_typos_and_keeps_what_defaults_fill_in_optional() -> None:
    part = {"type": "object", "description": "prose", "properties": {"name": {"type": "string"}}}
    reduced = reduce_schema(
        {
            "type": "object",
            "required": ["one", "filled"],
            "properties": {
                "one": part,
                "two": part,
                "filled": {"type": "string", "default": "TCP"},
                "port": {
                    "anyOf": [{"type": "integer"}, {"type": "string"}],
                    "x-kubernetes-int-or-string": True,
                },
                "anything": part | {"x-kubernetes-preserve-unknown-fields": True},
                "map": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        }
    )
    definitions = shared({"Kind": reduced})
    assert "prose" not in json.dumps(definitions)
    checker = jsonschema.Draft202012Validator({"$ref": "#/$defs/Kind", "$defs": definitions})
    for good in (
        {"one": {"name": "x"}, "port": "http"},
        {"one": {}, "anything": {"x": 1}, "map": {"x": "y"}},
    ):
        assert checker.is_valid(good), good
    for bad in ({}, {"one": {"nam": "x"}}, {"one": {}, "two": {"name": 1}}, {"one": {}, "map": {"x": 1}}):
        assert not checker.is_valid(bad), bad


def test_the_job_brings_the_cluster_that_stays() -> None:
    spec = cluster_spec(manifest("RayJob"))
    assert spec == cluster_spec(manifest("RayCluster"))
    for group in spec["workerGroupSpecs"]:
        assert 0 < group["minReplicas"] == group["replicas"] <= group["maxReplicas"], group["groupName"]


def test_a_job_that_fails_is_tried_again_and_leaves_no_gpu_behind() -> None:
    spec = manifest("RayJob")["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert job_config().resume
    assert any(text.startswith("name=") for text in entrypoint()), "an attempt finds the last one by its name"


def test_the_jobs_settings_are_valid() -> None:
    config = job_config()
    validate(config)
    (mount,) = cluster_spec(manifest("RayJob"))["headGroupSpec"]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    assert config.output_dir == mount["mountPath"]


def test_the_job_fits_the_nodes_that_are_always_there() -> None:
    config = job_config()
    there: list[dict[str, float]] = [{}, *nodes()]  # the head has nothing to give
    taken = check_room(there, config, config.placement.cpus_per_worker)
    # evaluator and replicas where no worker fits, so that the workers get the trainers' nodes whole
    for service, places in (("evaluator", 1), ("teachers", config.placement.teacher_replicas)):
        assert len(taken[service]) == places
        assert all(there[n]["CPU"] < config.placement.cpus_per_worker for n in taken[service])


@pytest.mark.parametrize("index", range(len(nodes())))
def test_the_job_needs_each_of_them(index: int) -> None:
    config = job_config()
    fewer = nodes()
    del fewer[index]
    with pytest.raises(PlacementError, match="does not fit"):
        check_room(fewer, config, config.placement.cpus_per_worker)


def test_its_largest_pool_of_teachers_fits_the_largest_cluster() -> None:
    most = job_config().placement.max_teacher_replicas
    config = job_config(f"placement.teacher_replicas={most}")
    check_room(nodes("maxReplicas"), config, config.placement.cpus_per_worker)
    config = job_config(
        f"placement.teacher_replicas={most + 1}", f"placement.max_teacher_replicas={most + 1}"
    )
    with pytest.raises(PlacementError, match="does not fit"):
        check_room(nodes("maxReplicas"), config, config.placement.cpus_per_worker)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_the_heads_ports_stay_inside_and_ask_for_the_token(kind: str) -> None:
    spec = cluster_spec(manifest(kind))
    assert spec["authOptions"] == {"mode": "token"}
    head = spec["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert not head.keys() & {"enableIngress", "ingressOptions", "headService"}
    assert head["rayStartParams"]["num-cpus"] == "0"
    for name, template in pod_templates(manifest(kind)):
        assert not template["spec"].keys() & {"hostNetwork", "hostPID", "hostIPC"}, name
    for name, container in containers(manifest(kind)):
        assert all("hostPort" not in port for port in container.get("ports", [])), name


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_pods_have_no_more_rights_than_they_need(kind: str) -> None:
    for name, template in pod_templates(manifest(kind)):
        context = template["spec"]["securityContext"]
        assert context["runAsNonRoot"], name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        # the autoscaler, beside the head, speaks to the API server; nobody else does
        assert template["spec"].get("automountServiceAccountToken", True) == (name == "head"), name
        assert template["metadata"]["labels"].items() >= PART_OF.items(), (
            f"{name}: no NetworkPolicy selects it"
        )
        for volume in template["spec"].get("volumes", []):
            assert volume == {"name": "runs", "persistentVolumeClaim": {"claimName": VOLUME}}, name
    for name, container in containers(manifest(kind)):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }, name
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], name
        assert resources["limits"].keys() >= {"cpu", "memory"}, name


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_credentials_come_from_a_secret(kind: str) -> None:
    wanted = [{"secretRef": {"name": "raydistill-credentials", "optional": True}}]
    for name, container in containers(manifest(kind)):
        assert "env" not in container, name
        works = name not in ("autoscaler", "submitter/ray-job-submitter")
        assert container.get("envFrom") == (wanted if works else None), name


def test_every_container_has_the_image_of_this_version_and_ray_the_tested_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line[:1].isalpha()
    ]
    (ray_pin,) = (str(pin.specifier).removeprefix("==") for pin in pins if pin.name == "ray")
    for kind in ("RayCluster", "RayJob"):
        assert cluster_spec(manifest(kind))["rayVersion"] == ray_pin
        images = {
            container["image"] for name, container in containers(manifest(kind)) if name != "autoscaler"
        }
        assert images == {f"registry.example.com/raydistill:{project['version']}"}


def test_what_the_cluster_expects_is_made_beforehand() -> None:
    claim, policy = documents("prerequisites.yaml")
    assert claim["metadata"]["name"] == VOLUME
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert policy["spec"]["podSelector"] == {"matchLabels": PART_OF}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    ours, operator = policy["spec"]["ingress"]
    assert ours == {"from": [{"podSelector": {"matchLabels": PART_OF}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    # the CRDs hold the schemas of both: a claim within a pod, ingress rules within KubeRay's own policies
    assert complaints(claim["spec"], inner_schema("accessModes", "volumeName")) == []
    rule = inner_schema("from", "ports")
    assert [complaints(each, rule) for each in (ours, operator)] == [[], []]
    assert "'form' was unexpected" in complaints({"form": []}, rule)[0]


def inner_schema(*properties: str) -> dict[str, Any]:
    """The schema in the CRDs that has these properties and the fewest others."""

    def inside(schema: Any) -> Iterator[dict[str, Any]]:
        if isinstance(schema, dict):
            if set(properties) <= schema.get("properties", {}).keys():
                yield schema
            for inner in schema.values():
                yield from inside(inner)

    return min(inside(SCHEMAS["$defs"]), key=lambda schema: len(schema["properties"]))


def launcher() -> dict[str, Any]:
    (found,) = documents("ray-cluster-launcher.yaml")
    return found


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of it before it reaches for the machines."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    ready: dict[str, Any] = prepare_config(config)
    validate_config(ready)
    return ready


def test_rays_launcher_accepts_its_file() -> None:
    config = launcher()
    ready = prepared(config)
    (kind,) = ready["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local


def break_by(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    broken = copy.deepcopy(launcher())
    change(broken)
    return broken


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (break_by(lambda c: c.update(setup_command=[])), "'setup_command' was unexpected"),
        (break_by(lambda c: c.update(max_workers="2")), "not supported between|is not of type 'integer'"),
        (break_by(lambda c: c["provider"].pop("type")), "type"),
        (break_by(lambda c: c.update(setup_commands=[1])), "1 is not of type 'string'"),
    ],
)
def test_rays_launcher_refuses_a_broken_file(broken: dict[str, Any], complaint: str) -> None:
    with pytest.raises((jsonschema.ValidationError, TypeError, KeyError), match=complaint):
        prepared(broken)


def test_nodes_that_the_launcher_starts_ask_for_the_token_and_keep_the_dashboard_to_themselves() -> None:
    config = launcher()
    assert "~/.ray/auth_token" in config["file_mounts"]
    starts = [config[f"{role}_start_ray_commands"][-1] for role in ("head", "worker")]
    for command in starts:
        for setting in ("RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0", "RAY_worker_niceness=0"):
            assert setting in command
    assert "--dashboard-host=127.0.0.1" in starts[0]


def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text()


def test_the_image_is_built_with_a_python_that_the_package_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (python,) = re.findall(r"^ARG PYTHON=(\S+)$", dockerfile(), re.MULTILINE)
    assert SpecifierSet(project["requires-python"]).contains(python)
    bases = re.findall(r"^FROM (\S+)", dockerfile(), re.MULTILINE)
    assert set(bases) == {"python:${PYTHON}-slim-bookworm"}


def test_what_the_image_copies_is_there_and_reaches_the_builder() -> None:
    copied = set()
    for line in re.findall(r"^COPY (.+)$", dockerfile(), re.MULTILINE):
        *sources, _ = line.split()
        if not sources[0].startswith("--from="):
            copied |= set(sources)
    let_in = {
        line.removeprefix("!")
        for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert copied == let_in
    for source in copied:
        assert (ROOT / source).exists(), source


def test_the_image_runs_as_the_user_of_the_manifests_from_the_jobs_folder() -> None:
    (user,) = re.findall(r"^USER (\d+):\d+$", dockerfile(), re.MULTILINE)
    for kind in ("RayCluster", "RayJob"):
        for name, template in pod_templates(manifest(kind)):
            assert template["spec"]["securityContext"]["runAsUser"] == int(user), name
    assert re.findall(r"^WORKDIR (\S+)$", dockerfile(), re.MULTILINE)[-1] == "/opt/raydistill"
    assert Path(entrypoint()[1]).parts[0] == "jobs"
    for setting in ("RAY_USAGE_STATS_ENABLED=0", "RAY_worker_niceness=0"):
        assert setting in dockerfile()
