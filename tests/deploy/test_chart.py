"""The rendered chart: helm's own checks, the API's schemas, and what each object must say."""

import functools
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from pdserve.config_load import config_from_dict
from tests.deploy.release import component_of, pod_templates, ray_start
from tests.deploy.tools import (
    CHART,
    CRD_FOLDER,
    PROFILES,
    RELEASE,
    Manifest,
    of_kind,
    one,
    refused,
    render,
    run_helm,
    values_arguments,
)

pytestmark = pytest.mark.deploy
KUBERNETES = "1.34"
CUSTOM = {
    "RayCluster": ("ray.io_rayclusters.yaml", "v1"),
    "ServiceMonitor": ("monitoring.coreos.com_servicemonitors.yaml", "v1"),
    "PrometheusRule": ("monitoring.coreos.com_prometheusrules.yaml", "v1"),
}
EVERYTHING = (
    "security.apiKeysSecret=keys",
    "security.tlsSecret=front-tls",
    "security.internalTlsSecret=inside-tls",
    "serviceMonitor.enabled=true",
    "prometheusRule.enabled=true",
    "grafanaDashboard.enabled=true",
    "networkPolicy.modelEgress=true",
    "networkPolicy.clients[0].podSelector.matchLabels.app=client",
    "model.hubTokenSecret.name=hub",
    "imagePullSecrets[0].name=pull",
    "admin.enabled=true",
    "admin.clients[0].podSelector.matchLabels.app=operator",
)
AUTOSCALED = ("ray.enableInTreeAutoscaling=true", "workerGroups.prefill.maxReplicas=3")
SCALED_PODS = ("ray.enabled=false", "autoscaling.enabled=true")
EXTERNAL = (
    "cacheserverSpec.externalUrl=rediss://cache.example:6379/0",
    "cacheserverSpec.externalSecret.name=redis",
    "gcsFaultTolerance.externalAddress=gcs.example:6379",
    "gcsFaultTolerance.externalSecret.name=gcs",
    "model.volume.existingClaim=models",
    "model.volume.readOnly=true",
    "security.existingSecret=mine",
)
VARIANTS = (
    *((profile, ()) for profile in PROFILES),
    ("", EVERYTHING),
    ("", AUTOSCALED),
    ("", SCALED_PODS),
    ("", EXTERNAL),
)
every_variant = pytest.mark.parametrize(("profile", "sets"), VARIANTS)


@every_variant
def test_helm_lints_it(profile: str, sets: tuple[str, ...]) -> None:
    done = run_helm("lint", "--strict", str(CHART), *values_arguments(profile, sets))
    assert done.returncode == 0, done.stdout


@every_variant
def test_the_api_takes_every_object(profile: str, sets: tuple[str, ...]) -> None:
    import kubernetes_validate

    plain = [entry for entry in render(profile, *sets) if entry["kind"] not in CUSTOM]
    assert {"ConfigMap", "Deployment", "Service"} <= {entry["kind"] for entry in plain}
    for entry in plain:
        kubernetes_validate.validate(entry, KUBERNETES, strict=True)


@functools.cache
def custom_schema(kind: str) -> dict[str, Any]:
    """The resource's own schema, closed: a field that it does not know is a fault."""
    name, version = CUSTOM[kind]
    path = CRD_FOLDER / name
    if not path.is_file():
        pytest.skip(f"SKIPPED CUSTOM RESOURCES: there is no {name} beside this checkout")
    definition = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    versions = {entry["name"]: entry for entry in definition["spec"]["versions"]}
    found: dict[str, Any] = versions[version]["schema"]["openAPIV3Schema"]
    closed(found)
    # The API server knows these parts itself.
    found["properties"]["metadata"] = {"type": "object"}
    return found


def closed(schema: Any) -> None:
    if isinstance(schema, dict):
        opened = schema.get("x-kubernetes-preserve-unknown-fields")
        if schema.get("type") == "object" and "properties" in schema and not opened:
            schema.setdefault("additionalProperties", False)
        if schema.pop("x-kubernetes-int-or-string", False):
            schema.pop("type", None)
        # A pod template's metadata is declared without its fields.
        for name, part in schema.items():
            if name == "metadata" and isinstance(part, dict) and part.get("type") == "object":
                part.pop("additionalProperties", None)
            closed(part)
    elif isinstance(schema, list):
        for part in schema:
            closed(part)


@every_variant
@pytest.mark.parametrize("kind", CUSTOM)
def test_the_operators_take_every_custom_resource(
    profile: str, sets: tuple[str, ...], kind: str
) -> None:
    for entry in of_kind(render(profile, *sets), kind):
        wrong = jsonschema.Draft7Validator(custom_schema(kind)).iter_errors(entry)
        assert [error.message for error in wrong] == []


def test_an_unknown_field_of_a_custom_resource_would_be_seen() -> None:
    cluster = json.loads(json.dumps(one(render(), "RayCluster")))
    pod = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["containers"][0]["livenesProbe"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(custom_schema("RayCluster")).validate(cluster)


def containers(template: Manifest) -> Iterator[dict[str, Any]]:
    spec = template["spec"]
    yield from (*spec.get("initContainers", ()), *spec["containers"])


@every_variant
def test_every_container_is_locked_down(profile: str, sets: tuple[str, ...]) -> None:
    templates = pod_templates(render(profile, *sets))
    assert {"router", "test"} <= set(templates)
    for component, template in templates.items():
        spec = template["spec"]
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] == pod["runAsGroup"] == pod["fsGroup"] == 10001
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        for host in ("hostNetwork", "hostPID", "hostIPC"):
            assert host not in spec
        assert spec["enableServiceLinks"] is False
        if "ray.enableInTreeAutoscaling=true" in sets and component == "head":
            # Ray's autoscaler calls the API; KubeRay makes an account for it.
            assert "serviceAccountName" not in spec
        else:
            assert spec["automountServiceAccountToken"] is False
            assert spec["serviceAccountName"] == "demo-pdserve"
        for container in containers(template):
            security = container["securityContext"]
            assert security == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "privileged": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            }, f"{component}/{container['name']}"
            assert set(container["resources"]) == {"requests", "limits"}
            assert not container["image"].endswith(":latest")
            assert ":" in container["image"] or "@sha256:" in container["image"]


@every_variant
def test_every_mount_has_its_volume_and_every_volume_a_limit(
    profile: str, sets: tuple[str, ...]
) -> None:
    for component, template in pod_templates(render(profile, *sets)).items():
        volumes = {volume["name"] for volume in template["spec"].get("volumes", ())}
        if component == "gcs":
            volumes.add("data")  # its claim
        for container in containers(template):
            mounts = container.get("volumeMounts", ())
            assert {mount["name"] for mount in mounts} <= volumes, component
            paths = [mount["mountPath"] for mount in mounts]
            assert len(set(paths)) == len(paths)
        assert "hostPath" not in json.dumps(template)


@every_variant
def test_every_selector_finds_its_pods_and_no_others(profile: str, sets: tuple[str, ...]) -> None:
    objects = render(profile, *sets)
    labels = {
        component: template["metadata"]["labels"]
        for component, template in pod_templates(objects).items()
    }
    for entry in objects:
        kind, spec = entry["kind"], entry.get("spec", {})
        if kind == "Service":
            selector, expected = spec["selector"], {behind(entry)}
        elif kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            selector, expected = spec["selector"]["matchLabels"], {component_of_name(entry)}
        else:
            continue
        found = {name for name, has in labels.items() if selector.items() <= has.items()}
        assert found == expected, f"{kind} {entry['metadata']['name']}"
    for monitor in of_kind(objects, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        found = [
            s for s in of_kind(objects, "Service") if wanted <= s["metadata"]["labels"].items()
        ]
        (service,) = found
        ports = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


def component_of_name(entry: Manifest) -> str:
    return str(entry["metadata"]["name"].removeprefix("demo-pdserve-"))


def behind(service: Manifest) -> str:
    """The component whose pods answer: the admin service is the router's process, too."""
    component = component_of_name(service)
    return "router" if component == "admin" else component


@every_variant
def test_every_port_leads_to_a_port_of_the_container(profile: str, sets: tuple[str, ...]) -> None:
    objects = render(profile, *sets)
    templates = pod_templates(objects)
    for service in of_kind(objects, "Service"):
        (container,) = templates[behind(service)]["spec"]["containers"]
        named = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in named
    router = templates["router"]["spec"]["containers"][0]
    config = yaml.safe_load(config_map(objects)["data"]["pdserve.yaml"])
    named = {port["name"]: port["containerPort"] for port in router["ports"]}
    expected = {"http": config["router"]["http_port"], "grpc": config["router"]["grpc_port"]}
    if "admin.enabled=true" in sets:
        expected["admin"] = config["admin"]["port"]
    assert named == expected
    ports = {p["name"]: p["port"] for p in one(objects, "Service", "-router")["spec"]["ports"]}
    assert ports == {"http": 8000, "grpc": 50051, "metrics": 9090}


def config_map(objects: tuple[Manifest, ...]) -> Manifest:
    return one(objects, "ConfigMap", "demo-pdserve")


@every_variant
def test_pdserve_takes_the_configuration_and_its_files_are_mounted(
    profile: str, sets: tuple[str, ...]
) -> None:
    objects = render(profile, *sets)
    config = config_from_dict(yaml.safe_load(config_map(objects)["data"]["pdserve.yaml"]))
    if "ray.enabled=false" in sets or profile == "values-gpu-node.yaml":
        assert config.pools.ray_address == "local"
    else:
        assert config.pools.ray_address == "demo-pdserve-head-svc:6379"
        groups = one(objects, "RayCluster")["spec"]["workerGroupSpecs"]
        slots = {}
        for group in groups:
            offered = json.loads(group["rayStartParams"]["resources"].strip("'"))
            slots |= {role: count * group["replicas"] for role, count in offered.items()}
        assert slots == {"prefill": config.pools.prefill, "decode": config.pools.decode}
    security, redis = config.security, config.cache.redis
    files = [*security.api_key_files, security.tls_cert, security.cluster_token_file]
    files += [security.hash_key_file, security.internal_ca, redis.password_file]
    files += [config.admin.token_file]
    template = pod_templates(objects)["router"]
    mounted = [m["mountPath"] for m in template["spec"]["containers"][0]["volumeMounts"]]
    for name in filter(None, files):
        assert any(name.startswith(path + "/") for path in mounted), name


@every_variant
def test_the_drain_ends_before_the_grace(profile: str, sets: tuple[str, ...]) -> None:
    objects = render(profile, *sets)
    spec = pod_templates(objects)["router"]["spec"]
    (container,) = spec["containers"]
    *_, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    config = config_from_dict(yaml.safe_load(config_map(objects)["data"]["pdserve.yaml"]))
    assert int(pause) + config.timers.drain_s < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("drain_s", [30, 300])
def test_workers_leave_their_pod_before_the_grace_ends(drain_s: int) -> None:
    templates = pod_templates(render("", f"config.timers.drain_s={drain_s}"))
    for role in ("prefill", "decode"):
        spec = templates[role]["spec"]
        (container,) = spec["containers"]
        *command, within = container["lifecycle"]["preStop"]["exec"]["command"]
        head = f"{RELEASE}-pdserve-head-svc:6379"
        assert command == ["pdserve", "leave", "--address", head, "--within"]
        assert drain_s < int(within) < spec["terminationGracePeriodSeconds"]


def test_a_longer_drain_gets_a_longer_grace() -> None:
    spec = pod_templates(render("", "config.timers.drain_s=300"))["router"]["spec"]
    assert spec["terminationGracePeriodSeconds"] == 340


def test_the_router_is_probed_where_it_answers() -> None:
    container = pod_templates(render())["router"]["spec"]["containers"][0]
    probes = {
        name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")
    }
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health",
        "liveness": "/health",
        "readiness": "/ready",
    }
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert {probe["scheme"] for probe in probes.values()} == {"HTTP"}
    secure = pod_templates(render("", *EVERYTHING))["router"]["spec"]["containers"][0]
    assert secure["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"


def test_ray_containers_are_probed_and_listen_on_ports_that_are_named() -> None:
    objects = render()
    templates = pod_templates(objects)
    for component in ("head", "prefill", "decode"):
        (container,) = templates[component]["spec"]["containers"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[name]["grpc"] == {"port": 6380}
        command = ray_start(one(objects, "RayCluster"), component)
        assert "--node-manager-port=6380" in command
        assert "--disable-usage-stats" in command
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in env["RAY_AUTH_TOKEN"]["valueFrom"]
        sysctls = templates[component]["spec"]["securityContext"]["sysctls"]
        assert sysctls == [{"name": "net.ipv4.ip_local_port_range", "value": "20000 29999"}]
    script = templates["router"]["spec"]["containers"][0]["args"][-1]
    assert "--num-cpus=0 --num-gpus=0" in script
    assert script.rstrip().endswith("exec pdserve up --config /etc/pdserve/config/pdserve.yaml")
    done = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_everything_is_denied_unless_a_policy_opens_it() -> None:
    objects = render()
    deny = one(objects, "NetworkPolicy", "default-deny")["spec"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny
    assert "egress" not in deny
    selector = deny["podSelector"]["matchLabels"].items()
    for component, template in pod_templates(objects).items():
        assert selector <= template["metadata"]["labels"].items(), component
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in (*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())):
            assert rule.get("ports"), f"{policy['metadata']['name']} opens every port"
    without = render("", "networkPolicy.enabled=false")
    assert not of_kind(without, "NetworkPolicy")


def test_secrets_stand_in_secrets_alone() -> None:
    objects = render()
    secret = one(objects, "Secret")
    assert set(secret["data"]) == {
        *("cluster-token", "hash-key", "ray-token", "admin-token", "cache-password", "gcs-password")
    }
    rest = json.dumps([entry for entry in objects if entry is not secret])
    for value in secret["data"].values():
        assert value not in rest
    assert not of_kind(render("", *EXTERNAL), "Secret")


def test_redis_keeps_what_each_is_for() -> None:
    templates = pod_templates(render())
    settings = {
        name: templates[name]["spec"]["containers"][0]["args"][0] for name in ("cache", "gcs")
    }
    assert "maxmemory-policy allkeys-lru" in settings["cache"]
    assert "appendonly no" in settings["cache"]
    assert "maxmemory-policy noeviction" in settings["gcs"]
    assert "appendonly yes" in settings["gcs"]
    assert all("requirepass $REDIS_PASSWORD" in text for text in settings.values())
    cluster = one(render(), "RayCluster")["spec"]
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "demo-pdserve-gcs:6379"
    assert one(render(), "StatefulSet")["spec"]["volumeClaimTemplates"]


def test_pools_spread_over_hosts_and_keep_a_budget() -> None:
    objects = render("values-two-pools.yaml")
    templates = pod_templates(objects)
    for component in ("prefill", "decode", "router"):
        (spread,) = templates[component]["spec"]["topologySpreadConstraints"]
        labels = templates[component]["metadata"]["labels"]
        assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
        assert spread["topologyKey"] == "kubernetes.io/hostname"
    for role in ("prefill", "decode"):
        assert one(objects, "PodDisruptionBudget", role)["spec"]["minAvailable"] == 1
        spec = templates[role]["spec"]
        assert spec["nodeSelector"] == {"pdserve.io/pool": role}
        (container,) = spec["containers"]
        assert container["resources"]["limits"]["rdma/hca_shared_devices"] == 1
        assert {"NCCL_IB_HCA", "NCCL_SOCKET_IFNAME"} <= {e["name"] for e in container["env"]}


def test_only_pods_that_are_whole_clusters_are_scaled() -> None:
    hpa = one(render("", *SCALED_PODS), "HorizontalPodAutoscaler")["spec"]
    assert hpa["scaleTargetRef"]["name"] == "demo-pdserve-router"
    assert "replicas" not in one(render("", *SCALED_PODS), "Deployment", "-router")["spec"]
    assert "ray.enabled" in refused("", "autoscaling.enabled=true")
    assert "replicaCount" in refused("", "routerSpec.replicaCount=2")


def test_helm_itself_refuses_a_typo_and_names_it() -> None:
    assert "replcaCount" in refused("", "routerSpec.replcaCount=1")
    assert "polcy" in refused("", "config.router.polcy=prefix")
    assert "round_robin" in refused("", "config.router.policy=nearest")


def test_the_notes_name_the_next_command() -> None:
    notes = run_helm("install", "demo", str(CHART), "--dry-run=client", "--namespace", "serving")
    assert notes.returncode == 0, notes.stderr
    said = notes.stdout.partition("NOTES:")[2]
    assert "kubectl -n serving rollout status deployment/demo-pdserve-router" in said
    assert "helm -n serving test demo --logs" in said


def test_components_have_templates_of_their_own_name() -> None:
    for component, template in pod_templates(render()).items():
        assert component == component_of(template)
