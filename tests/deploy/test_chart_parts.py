"""The chart part by part: what each profile is for, and that parts which belong together agree."""

import re
from typing import Any

import pytest
import yaml

from pdserve.config_load import config_from_dict
from pdserve.telemetry.metrics import PREFIX
from tests.deploy.release import Release, pod_templates
from tests.deploy.test_release_runs import allows
from tests.deploy.tools import CHART, PROFILES, Manifest, of_kind, one, render

pytestmark = pytest.mark.deploy
LOCKED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "privileged": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
PODS = ("ray.enabled=false", "routerSpec.replicaCount=3", "config.timers.drain_s=45")


def config_of(objects: tuple[Manifest, ...]) -> Any:
    text = one(objects, "ConfigMap", "demo-pdserve")["data"]["pdserve.yaml"]
    return config_from_dict(yaml.safe_load(text))


def container(objects: tuple[Manifest, ...], component: str) -> dict[str, Any]:
    (found,) = pod_templates(objects)[component]["spec"]["containers"]
    return dict(found)


# ---- profiles -----------------------------------------------------------------------------------


def test_the_cpu_demonstration_asks_for_no_gpu_and_little_memory() -> None:
    objects = render("values-cpu.yaml")
    for component in pod_templates(objects):
        asked = container(objects, component)["resources"]
        assert "nvidia.com/gpu" not in str(asked), component
    config = config_of(objects)
    assert config.model.path == "smollm2-135m-instruct"
    assert config.pools.gpus_per_worker == 0
    assert config.transfer.transports == ("tcp",), "pods share no memory"
    assert config.router.strict


def test_one_gpu_node_is_one_pod_with_a_gpu_for_each_worker() -> None:
    objects = render("values-gpu-node.yaml")
    assert not of_kind(objects, "RayCluster")
    assert not of_kind(objects, "StatefulSet")
    spec = pod_templates(objects)["router"]["spec"]
    router = container(objects, "router")
    config = config_of(objects)
    workers = config.pools.prefill + config.pools.decode
    assert router["resources"]["limits"]["nvidia.com/gpu"] == workers == 2
    assert config.pools.gpus_per_worker == 1
    assert config.transfer.transports == ("cuda_ipc", "nccl", "tcp"), "each has a GPU of its own"
    assert router["image"].endswith("-cuda")
    assert spec["runtimeClassName"] == "nvidia"
    assert [one["key"] for one in spec["tolerations"]] == ["nvidia.com/gpu"]


def test_two_pools_speak_nccl_over_rdma_and_have_a_gpu_for_each_worker() -> None:
    objects = render("values-two-pools.yaml")
    config = config_of(objects)
    assert config.transfer.transports == ("nccl", "tcp")
    groups = {g["groupName"]: g for g in one(objects, "RayCluster")["spec"]["workerGroupSpecs"]}
    for role in ("prefill", "decode"):
        worker = container(objects, role)
        env = {entry["name"]: entry.get("value") for entry in worker["env"]}
        assert env["NCCL_IB_HCA"] == "mlx5"
        assert env["NCCL_IB_GID_INDEX"] == "3"
        assert env["NCCL_SOCKET_IFNAME"] == "eth0"
        assert env["NCCL_NET_GDR_LEVEL"] == "PHB"
        limits = worker["resources"]["limits"]
        assert limits["rdma/hca_shared_devices"] == 1
        assert limits["nvidia.com/gpu"] == 4
        assert f'"{role}": 4' in groups[role]["rayStartParams"]["resources"]
        assert groups[role]["replicas"] * 4 == getattr(config.pools, role)
        # Pinned memory needs no capability where the runtime's memlock limit is unlimited.
        assert worker["securityContext"] == LOCKED
        shm = next(v for v in pod_templates(objects)[role]["spec"]["volumes"] if v["name"] == "shm")
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert "nvidia.com/gpu" not in str(container(objects, "router")["resources"])


# ---- Redis twice --------------------------------------------------------------------------------


def test_the_two_redis_share_nothing() -> None:
    objects = render()
    cache, gcs = container(objects, "cache"), container(objects, "gcs")
    keys = [
        entry["valueFrom"]["secretKeyRef"]["key"]
        for part in (cache, gcs)
        for entry in part["env"]
        if entry["name"] == "REDIS_PASSWORD"
    ]
    assert keys == ["cache-password", "gcs-password"]
    cluster = one(objects, "RayCluster")
    assert cluster["metadata"]["annotations"] == {"ray.io/ft-enabled": "true"}
    options = cluster["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "demo-pdserve-gcs:6379"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["key"] == "gcs-password"
    assert config_of(objects).cache.redis.url == "redis://demo-pdserve-cache:6379/0"
    (claim,) = one(objects, "StatefulSet", "-gcs")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_valkey_takes_the_place_of_redis() -> None:
    image = "docker.io/valkey/valkey:9.0"
    sets = [f"{part}.image={image}" for part in ("cacheserverSpec", "gcsFaultTolerance")]
    sets += [f"{part}.command=valkey-server" for part in ("cacheserverSpec", "gcsFaultTolerance")]
    objects = render("", *sets)
    for component in ("cache", "gcs"):
        made = container(objects, component)
        assert made["image"] == image
        assert made["args"][0].startswith("exec valkey-server - <<END")
        assert made["securityContext"] == LOCKED


def test_without_a_cache_nothing_of_it_is_left() -> None:
    objects = render("", "cacheserverSpec.enabled=false")
    assert "cache" not in pod_templates(objects)
    assert config_of(objects).cache.redis.mode == "off"
    assert not [e for e in objects if e["metadata"]["name"].endswith("-cache")]


def test_redis_elsewhere_is_called_with_its_own_secret() -> None:
    objects = render(
        "",
        "cacheserverSpec.externalUrl=rediss://cache.example:6379/0",
        "cacheserverSpec.externalSecret.name=redis",
        "gcsFaultTolerance.externalAddress=gcs.example:6379",
        "gcsFaultTolerance.externalSecret.name=gcs",
    )
    assert {"cache", "gcs"}.isdisjoint(pod_templates(objects))
    assert config_of(objects).cache.redis.url == "rediss://cache.example:6379/0"
    options = one(objects, "RayCluster")["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "gcs.example:6379"
    reference = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": "gcs", "key": "password"}


# ---- security -----------------------------------------------------------------------------------


def test_rays_autoscaler_beside_the_head_is_locked_down_as_well() -> None:
    cluster = one(render("", "ray.enableInTreeAutoscaling=true"), "RayCluster")["spec"]
    options = cluster["autoscalerOptions"]
    assert options["securityContext"] == LOCKED
    assert set(options["resources"]) == {"requests", "limits"}
    assert options["version"] == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


PARTS = ("router", "head", "prefill", "decode", "cache", "gcs", "test")
RAY = ("head", "prefill", "decode", "router")
WORKING = ("prefill", "decode", "router")
# Who may call whom, and on which ports: the whole of it.
MAY: dict[tuple[str, str], set[int]] = {}
for source in RAY:
    for target in RAY:
        MAY.setdefault((source, target), set()).update({6380, 6385, 10002, 10999})
    MAY.setdefault((source, "head"), set()).add(6379)
for source in WORKING:
    for target in WORKING:
        MAY.setdefault((source, target), set()).update({20000, 29999})
    MAY.setdefault((source, "cache"), set()).add(6379)
MAY["head", "gcs"] = {6379}
MAY["test", "router"] = {8000, 50051}
PORTS = (22, 6379, 6380, 6385, 8000, 8265, 9090, 10001, 10002, 10999, 20000, 29999, 50051, 50052)


def test_the_policies_open_these_ways_and_no_others() -> None:
    release = Release.__new__(Release)
    release.objects = render("values-cpu.yaml")
    opened = {
        (source, target): ports
        for source in PARTS
        for target in PARTS
        if (ports := {port for port in PORTS if allows(release, source, target, port)})
    }
    assert opened == MAY


# ---- lives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_everything_that_runs_on_is_probed_in_three_ways(profile: str) -> None:
    for component, template in pod_templates(render(profile)).items():
        for made in template["spec"]["containers"]:
            probes = {name for name in made if name.endswith("Probe")}
            expected = set() if component == "test" else {"startup", "liveness", "readiness"}
            assert probes == {f"{name}Probe" for name in expected}, component


def test_pods_that_are_whole_clusters_are_replaced_one_by_one() -> None:
    """The new one is ready before the old one leaves, and is not killed before it has drained."""
    objects = render("", *PODS)
    deployment = one(objects, "Deployment", "-router")["spec"]
    assert deployment["replicas"] == 3
    assert deployment["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
    }
    budget = one(objects, "PodDisruptionBudget", "-router")["spec"]
    assert budget["maxUnavailable"] == 1
    spec = pod_templates(objects)["router"]["spec"]
    pause = int(container(objects, "router")["lifecycle"]["preStop"]["exec"]["command"][-1])
    probe = container(objects, "router")["readinessProbe"]
    # Endpoints forget the pod first, then it drains, and is not killed before it has.
    assert pause >= probe["periodSeconds"]
    assert pause + 45 < spec["terminationGracePeriodSeconds"]
    assert probe["httpGet"]["path"] == "/ready", "a new pod counts when a request went all the way"


def test_the_one_router_of_a_ray_cluster_is_never_there_twice() -> None:
    assert one(render(), "Deployment", "-router")["spec"]["strategy"] == {"type": "Recreate"}
    assert one(render(), "RayCluster")["spec"]["upgradeStrategy"] == {"type": "Recreate"}


def test_a_changed_configuration_changes_the_pod() -> None:
    def checksum(*sets: str) -> str:
        template = pod_templates(render("", *sets))["router"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum() != checksum("config.engine.prefill_chunk=64")
    assert checksum() == checksum("image.tag=other"), "the image changes the pod by itself"


# ---- monitoring, scaling, the question ----------------------------------------------------------


def test_the_monitor_scrapes_the_router_and_trusts_its_certificate() -> None:
    sets = ("serviceMonitor.enabled=true", "serviceMonitor.labels.release=prometheus")
    monitor = one(render("", *sets), "ServiceMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint == {"port": "metrics", "path": "/metrics", "interval": "15s"}
    secure = one(render("", *sets, "security.tlsSecret=front"), "ServiceMonitor")
    (endpoint,) = secure["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"]["ca"]["secret"] == {"name": "front", "key": "tls.crt"}
    assert endpoint["tlsConfig"]["serverName"] == "demo-pdserve-router"


def example(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "examples" / name).read_text(encoding="utf-8"))
    return found


def test_the_examples_of_scaling_fit_the_chart_and_the_metrics() -> None:
    objects = render("", "ray.enabled=false", "autoscaling.enabled=true")
    hpa = one(objects, "HorizontalPodAutoscaler")["spec"]
    (metric,) = hpa["metrics"]
    (rule,) = example("prometheus-adapter.yaml")["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    scaled = example("keda.yaml")["spec"]
    deployment = one(objects, "Deployment", "-router")
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (trigger,) = scaled["triggers"]
    series = re.compile(rf"{PREFIX}requests_in_flight\b")
    assert series.search(trigger["metadata"]["query"])
    assert series.search(rule["seriesQuery"])
    service = one(objects, "Service", "-router")["metadata"]["name"]
    assert f'service="{service}"' in trigger["metadata"]["query"]
    assert trigger["metadata"]["threshold"] == metric["pods"]["target"]["averageValue"]


def test_helm_test_asks_the_service_with_what_it_needs() -> None:
    sets = ("security.apiKeysSecret=keys", "security.tlsSecret=front")
    pod = next(p for p in of_kind(render("", *sets), "Pod"))
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["spec"]["restartPolicy"] == "Never"
    (question,) = pod["spec"]["containers"]
    assert question["command"][:3] == ["pdserve", "generate", "What is the capital of France?"]
    assert {
        "--address=demo-pdserve-router:50051",
        "--api-key-file=/etc/pdserve/api-keys/api-keys",
        "--ca-file=/etc/pdserve/tls/tls.crt",
        "--usage",
    } <= set(question["command"])
    (tls,) = [v for v in pod["spec"]["volumes"] if v["name"] == "tls"]
    assert tls["secret"]["items"] == [{"key": "tls.crt", "path": "tls.crt"}], "without the key"
