"""The cluster launcher's files: Ray's own schema, its own preparation, and what we mean by them."""

import json
import shlex
import subprocess
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pdserve.config_load import load_config
from tests.source_tree import ROOT

FOLDER = ROOT / "deploy" / "ray"
LAUNCHED = ("hosts.yaml", "aws.yaml")
COMMANDS = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_file(name: str) -> None:
    schema = json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text())
    wrong = jsonschema.Draft7Validator(schema).iter_errors(read(name))
    assert [error.message for error in wrong] == []
    prepared = prepare_config(read(name))
    validate_config(prepared)
    assert prepared["cluster_name"] == read(name)["cluster_name"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_typo_is_seen(name: str) -> None:
    schema = json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read(name) | {"max_worker": 3}, schema)


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("part", COMMANDS)
def test_every_command_is_shell(name: str, part: str) -> None:
    for command in read(name)[part]:
        done = subprocess.run(
            ["bash", "-n", "-c", command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_demands_the_token_and_stores_little(name: str) -> None:
    config = read(name)
    assert "~/.ray/auth_token" in config["file_mounts"]
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        assert "--object-store-memory=83886080" in command


def test_types_of_the_cloud_offer_one_role_each_and_can_grow() -> None:
    types = read("aws.yaml")["available_node_types"]
    for role in ("prefill", "decode"):
        kind = types[role]
        assert kind["resources"][role] == kind["resources"]["GPU"] == 1
        assert kind["labels"] == {"pdserve.io/pool": role}
        assert 1 <= kind["min_workers"] < kind["max_workers"]
    assert types["head"]["resources"] == {"CPU": 0}, "nothing is placed on the head"
    assert read("aws.yaml")["head_node_type"] == "head"


def role_of(address: str) -> str:
    """Runs the table of the host list as such a host would, up to ``ray start``."""
    (command,) = [c for c in read("hosts.yaml")["worker_start_ray_commands"] if "ray start" in c]
    decide, _, rest = command.partition("ulimit")
    assert '--resources="{\\"$role\\": 1}"' in rest
    fake = f"hostname() {{ echo {shlex.quote(address)} 172.17.0.1; }}; "
    done = subprocess.run(
        ["bash", "-c", fake + decide + "echo $role"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def test_every_host_of_the_list_has_a_role_and_no_other_has() -> None:
    roles = {address: role_of(address) for address in read("hosts.yaml")["provider"]["worker_ips"]}
    assert set(roles.values()) == {"prefill", "decode"}, roles
    assert role_of("192.0.2.1") == ""
    assert role_of("192.0.2.110") == "", "an address that only begins like one of the list"


def test_the_configuration_joins_the_ray_of_its_node() -> None:
    config = load_config(FOLDER / "pdserve.yaml")
    assert config.pools.ray_address == "auto"
    assert config.router.strict
    assert "shm" not in config.transfer.transports, "hosts share no memory"
