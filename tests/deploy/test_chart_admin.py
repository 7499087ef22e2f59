"""The admin service in the rendered chart: off unless asked for, open to nobody unless named."""

import json

import pytest
import yaml

from tests.deploy.release import pod_templates
from tests.deploy.tools import CHART, Manifest, of_kind, one, refused, render, run_helm

pytestmark = pytest.mark.deploy
ADMIN = ("admin.enabled=true", "security.internalTlsSecret=inside-tls")
CALLERS = (
    "admin.clients[0].namespaceSelector.matchLabels.team=ops",
    "admin.clients[0].podSelector.matchLabels.app=operator",
)
PORT = 50052


def admin_config(objects: tuple[Manifest, ...]) -> dict[str, object]:
    text = one(objects, "ConfigMap", "demo-pdserve")["data"]["pdserve.yaml"]
    found: dict[str, object] = yaml.safe_load(text)["admin"]
    return found


def opens(objects: tuple[Manifest, ...]) -> list[dict[str, object]]:
    """Every ingress rule that names the admin port, whatever pods it is for."""
    policies = of_kind(objects, "NetworkPolicy")
    return [
        rule
        for policy in policies
        for rule in policy["spec"].get("ingress", ())
        if any(one["port"] <= PORT <= one.get("endPort", one["port"]) for one in rule["ports"])
    ]


def test_by_default_it_listens_to_its_own_pod_alone() -> None:
    objects = render()
    assert admin_config(objects) == {"host": "127.0.0.1", "port": 0}
    assert not [s for s in of_kind(objects, "Service") if s["metadata"]["name"].endswith("admin")]
    assert opens(objects) == []
    router = pod_templates(objects)["router"]["spec"]
    assert "admin-token" not in json.dumps(router)


def test_enabled_it_has_a_port_a_service_and_a_secret_of_its_own() -> None:
    objects = render("", *ADMIN)
    config = admin_config(objects)
    assert config == {
        "host": "0.0.0.0",
        "port": PORT,
        "token_file": "/etc/pdserve/admin/admin-token",
    }
    service = one(objects, "Service", "-admin")["spec"]
    assert service["type"] == "ClusterIP"
    assert service["ports"] == [
        {
            "name": "admin",
            "port": PORT,
            "targetPort": "admin",
            "protocol": "TCP",
            "appProtocol": "grpc",
        }
    ]
    public = one(objects, "Service", "-router")["spec"]
    assert PORT not in {port["port"] for port in public["ports"]}
    templates = pod_templates(objects)
    (volume,) = [v for v in templates["router"]["spec"]["volumes"] if v["name"] == "admin"]
    assert volume["secret"]["items"] == [{"key": "admin-token", "path": "admin-token"}]
    assert volume["secret"]["defaultMode"] == 0o440
    for component in set(templates) - {"router"}:
        assert "admin-token" not in json.dumps(templates[component]), component


def test_who_may_call_it_is_who_the_operator_names() -> None:
    assert opens(render("", *ADMIN)) == []
    (rule,) = opens(render("", *ADMIN, *CALLERS))
    assert rule == {
        "ports": [{"protocol": "TCP", "port": PORT}],
        "from": [
            {
                "namespaceSelector": {"matchLabels": {"team": "ops"}},
                "podSelector": {"matchLabels": {"app": "operator"}},
            }
        ],
    }
    # Whoever may ask the model may not therefore change the cluster.
    clients = "networkPolicy.clients[0].podSelector.matchLabels.app=client"
    assert opens(render("", *ADMIN, clients)) == []


def test_it_is_refused_where_it_would_be_unsafe_or_reach_any_of_several() -> None:
    assert "security.internalTlsSecret" in refused("", "admin.enabled=true")
    assert "one router" in refused("", *ADMIN, "ray.enabled=false", "routerSpec.replicaCount=2")
    assert "one router" in refused("", *ADMIN, "ray.enabled=false", "autoscaling.enabled=true")


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ((), "pdserve admin pools --config /etc/pdserve/config/pdserve.yaml"),
        (ADMIN, "demo-pdserve-admin lets nobody in"),
        ((*ADMIN, *CALLERS), "pdserve admin pools --address demo-pdserve-admin:50052"),
    ],
)
def test_the_notes_name_the_command(sets: tuple[str, ...], said: str) -> None:
    arguments = [part for text in sets for part in ("--set", text)]
    done = run_helm("install", "demo", str(CHART), "--dry-run=client", *arguments)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout.partition("NOTES:")[2]
