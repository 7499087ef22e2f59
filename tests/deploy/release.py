"""The rendered chart, run as processes: what KubeRay and the kubelet would do with it, in small.

    with Release(objects) as release:
        release.start("cache"), ... release.start("router")

KubeRay's part that is done here: the ``ray start`` line from rayStartParams, the variables of fault
tolerance, the head's name. The kubelet's: variables, files of secrets and configuration, init
containers one after another, the probes' protocol. Folders of the image are replaced by ones of
this machine, everywhere in the manifests alike.
"""

from __future__ import annotations

import base64
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tests.deploy.pods import Pod, Site, path_inside, source_path
from tests.deploy.tools import RELEASE, Manifest, of_kind, one

NAME = f"{RELEASE}-pdserve"
COMPONENTS = ("cache", "gcs", "head", "prefill", "decode", "router", "test")


def component_of(template: Manifest) -> str:
    return str(template["metadata"]["labels"]["app.kubernetes.io/component"])


def pod_templates(objects: Sequence[Manifest]) -> dict[str, Manifest]:
    """Every pod template of the release, by component."""
    found = [entry["spec"]["template"] for entry in of_kind(objects, "Deployment")]
    found += [entry["spec"]["template"] for entry in of_kind(objects, "StatefulSet")]
    found += of_kind(objects, "Pod")
    for cluster in of_kind(objects, "RayCluster"):
        found.append(cluster["spec"]["headGroupSpec"]["template"])
        found += [group["template"] for group in cluster["spec"]["workerGroupSpecs"]]
    return {component_of(template): template for template in found}


def ray_start(cluster: Manifest, component: str) -> str:
    """The command that KubeRay writes for a Ray container."""
    spec = cluster["spec"]
    head = component == "head"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    params = spec["headGroupSpec"] if head else groups[component]
    options = []
    for name, value in params["rayStartParams"].items():
        if value.lower() in ("true", "false") and name != "include-dashboard":
            options += [f"--{name}"] if value.lower() == "true" else []
        else:
            options.append(f"--{name}={value}")
    where = "--head" if head else f"--address={cluster['metadata']['name']}-head-svc:6379"
    if head and "gcsFaultToleranceOptions" in spec:
        options.append('--redis-password="$REDIS_PASSWORD"')
    return f"ulimit -n 65536 2>/dev/null; exec ray start {where} {' '.join(options)} --block"


class Release:
    """Owns the site. ``objects``: as render() returns them."""

    def __init__(self, objects: Sequence[Manifest]) -> None:
        names = {name: [f"{NAME}-{name}"] for name in COMPONENTS}
        names["head"] = [f"{NAME}-head-svc"]
        self.site = Site(names)
        folder = self.site.folder
        (folder / "models").mkdir(mode=0o777)
        (folder / "models").chmod(0o777)
        self.objects = tuple(self._local(entry) for entry in objects)
        self.templates = pod_templates(self.objects)
        self._write_files(folder / "etc")

    def _local(self, entry: Manifest) -> Manifest:
        text, folder = yaml.safe_dump(entry), self.site.folder
        text = text.replace("/etc/pdserve", f"{folder}/etc").replace("/models", f"{folder}/models")
        local: Manifest = yaml.safe_load(text)
        return local

    def __enter__(self) -> Release:
        self.site.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.site.close()

    def pod(self, component: str) -> Pod:
        return self.site.pods[component]

    def secret(self, key: str) -> str:
        data = one(self.objects, "Secret")["data"]
        return base64.b64decode(data[key]).decode()

    def start(self, component: str) -> subprocess.Popen[bytes]:
        """Init containers in order, then the container; does not wait for it."""
        template = self.templates[component]["spec"]
        for container in template.get("initContainers", ()):
            done = self._run(component, container)
            assert done.returncode == 0, f"{container['name']}: {done.stdout}{done.stderr}"
        (container,) = template["containers"]
        return self.pod(component).start(self._command(component, container), self._env(component))

    def ask(self) -> subprocess.CompletedProcess[str]:
        """Runs the pod of ``helm test``."""
        (container,) = self.templates["test"]["spec"]["containers"]
        return self._run("test", container)

    def execute(self, component: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A command beside the container's own, as the kubelet runs a hook."""
        (container,) = self.templates[component]["spec"]["containers"]
        env = self._env(component, container)
        return self.pod(component).run("exec " + shlex.join(words), env, timeout=120)

    def probe_ray(self, component: str, timeout_s: float = 60.0) -> None:
        """Waits until the container's gRPC probe is answered, as the kubelet asks: no token."""
        (container,) = self.templates[component]["spec"]["containers"]
        port = container["readinessProbe"]["grpc"]["port"]
        script = Path(__file__).with_name("health_probe.py")
        address = f"{self.pod(component).address}:{port}"
        env = {"PATH": path_inside()}
        limit = time.monotonic() + timeout_s
        while self.pod("test").run(f"python {script} {address}", env).returncode:
            assert time.monotonic() < limit, self.pod(component).log.read_text()[-2000:]
            time.sleep(0.5)

    def _run(self, component: str, container: Manifest) -> subprocess.CompletedProcess[str]:
        env = self._env(component, container)
        return self.pod(component).run(self._command(component, container), env, timeout=120)

    def _command(self, component: str, container: Manifest) -> str:
        if container["name"].startswith("ray-"):
            return ray_start(one(self.objects, "RayCluster"), component)
        words = [*container.get("command", ()), *container.get("args", ())]
        own = self.pod(component).folder
        return "exec " + shlex.join(str(word).replace("/data", f"{own}/data") for word in words)

    def _env(self, component: str, container: Manifest | None = None) -> dict[str, str]:
        found = container or self.templates[component]["spec"]["containers"][0]
        env = {
            "PATH": path_inside(),
            "PYTHONPATH": source_path(),
            "LANG": "C.UTF-8",
            "GRPC_DNS_RESOLVER": "native",
        }
        for entry in found.get("env", ()):
            env[entry["name"]] = self._value(entry)
        home = self.pod(component).folder / "home"
        env = {name: value.replace("/var/lib/pdserve", str(home)) for name, value in env.items()}
        cluster = one(self.objects, "RayCluster")["spec"]
        if component == "head" and "gcsFaultToleranceOptions" in cluster:
            options = cluster["gcsFaultToleranceOptions"]
            env["RAY_REDIS_ADDRESS"] = options["redisAddress"]
            env["REDIS_PASSWORD"] = self._value(options["redisPassword"])
            env["RAY_external_storage_namespace"] = "f00d"
        return env

    def _value(self, entry: Mapping[str, Any]) -> str:
        if "valueFrom" in entry:
            return self.secret(entry["valueFrom"]["secretKeyRef"]["key"])
        return str(entry["value"])

    def _write_files(self, folder: Path) -> None:
        (folder / "config").mkdir(parents=True)
        (folder / "secrets").mkdir()
        text = one(self.objects, "ConfigMap", NAME)["data"]["pdserve.yaml"]
        # Each pod's home is its own, so it stays a name that the pod's shell knows.
        (folder / "config" / "pdserve.yaml").write_text(text.replace("/var/lib/pdserve", "~"))
        volumes = self.templates["router"]["spec"]["volumes"]
        (secrets,) = [volume for volume in volumes if volume["name"] == "secrets"]
        for source in secrets["projected"]["sources"]:
            for item in source["secret"]["items"]:
                (folder / "secrets" / item["path"]).write_text(self.secret(item["key"]))
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
