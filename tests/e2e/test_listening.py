"""Nothing of ours or Ray's can be reached from outside this machine, unless it is configured."""

from __future__ import annotations

import os
import socket

import pytest

from tests.e2e.clusters import Clusters, Running, Variant
from tests.sockets import Listener, listeners, with_mark

pytestmark = pytest.mark.cluster

# With TCP the transfer servers listen as well.
VARIANT = Variant("llama", "tcp", "tight")


def all_listeners(cluster: Running, clusters: Clusters) -> list[Listener]:
    marked = with_mark(clusters.ray.mark, cluster.cluster.run.mark)
    return listeners([*marked, os.getpid()])


def test_every_listening_socket_is_on_loopback(clusters: Clusters) -> None:
    cluster = clusters.get(VARIANT)
    cluster.caller.ask((5, 6, 7) * 20, 4)
    found = all_listeners(cluster, clusters)
    for one in found:
        print(one)
    assert [one for one in found if not one.is_loopback] == []
    # The list is whole: it has what is known to listen.
    ports = {one.port for one in found}
    addresses = cluster.cluster.addresses
    for address in (addresses.http, addresses.grpc, addresses.internal):
        assert int(address.rpartition(":")[2]) in ports
    by_pid = {one.pid for one in found}
    for facts in cluster.cluster.workers():
        mine = {one.port for one in found if one.pid == facts.pid}
        assert int(facts.address.rpartition(":")[2]) in mine
        assert int(facts.kv_events_address.rpartition(":")[2]) in mine
        assert len(mine) >= 3, "KV events, their replay, the worker's own port, Ray's"
    assert any("gcs_server" in one.command for one in found)
    assert any("raylet" in one.command for one in found)
    assert cluster.cluster.router_pid in by_pid
    # Redis has no port at all.
    assert not any("redis-server" in one.command for one in found)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_socket_on_all_interfaces_would_be_seen(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        (seen,) = [one for one in listeners([os.getpid()]) if one.port == port]
    assert not seen.is_loopback
    with socket.socket(family, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind((host, 0))
        port = datagrams.getsockname()[1]
        seen = next(one for one in listeners([os.getpid()]) if one.port == port)
    assert not seen.is_loopback
