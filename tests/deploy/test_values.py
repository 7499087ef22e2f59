"""The chart's values without helm: what its schema takes and refuses."""

import copy
import json
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.helm import make_schema
from pdserve.config_load import config_from_dict, walk
from tests.deploy.tools import CHART, PROFILES

SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def values(profile: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    if profile:
        merge(found, yaml.safe_load((CHART / profile).read_text(encoding="utf-8")))
    return found


def merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            into[name] = value


def test_the_schema_is_the_one_that_values_and_configuration_give() -> None:
    same = (CHART / "values.schema.json").read_text(encoding="utf-8") == make_schema.render()
    assert same, "run: python deploy/helm/make_schema.py"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_taken(profile: str) -> None:
    wrong = jsonschema.Draft7Validator(SCHEMA).iter_errors(values(profile))
    assert [error.message for error in wrong] == []


def every_key(at: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every key whose siblings the schema knows one by one."""
    found = []
    for name, value in at.items():
        found.append((*path, name))
        schema = schema_at((*path, name))
        if isinstance(value, dict) and schema.get("properties"):
            found += every_key(value, (*path, name))
    return found


def schema_at(path: tuple[str, ...]) -> dict[str, Any]:
    schema: dict[str, Any] = SCHEMA
    for name in path:
        schema = schema.get("properties", {}).get(name, {})
    return schema


@pytest.mark.parametrize("path", every_key(values("")), ids=".".join)
def test_a_typo_in_any_key_is_refused(path: tuple[str, ...]) -> None:
    changed = copy.deepcopy(values(""))
    at = changed
    for name in path[:-1]:
        at = at[name]
    at[path[-1] + "x"] = at.pop(path[-1])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, SCHEMA)


@pytest.mark.parametrize("path", make_schema.OWNED)
def test_what_the_chart_sets_cannot_be_set_beside_it(path: str) -> None:
    assert path in {key.path for key in walk()}, "pdserve has no such key any more"
    config: dict[str, Any] = {}
    at = config
    *sections, name = path.split(".")
    for section in sections:
        at = at.setdefault(section, {})
    at[name] = next(key.default for key in walk() if key.path == path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"config": config}, SCHEMA)


def test_values_out_of_bounds_are_refused() -> None:
    for wrong in (
        {"config": {"router": {"policy": "nearest"}}},
        {"config": {"engine": {"block_size": 0}}},
        {"config": {"transfer": {"transports": ["tcp", "pigeon"]}}},
        {"workerGroups": {"prefill": {"workersPerPod": 0}}},
        {"image": {"digest": "sha256:12"}},
        {"security": {"runAsUser": 0}},
        {"routerSpec": {"httpPort": 70000}},
        {"cacheserverSpec": {"externalUrl": "http://redis"}},
        {"head": {"resources": {"limits": {}}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


@pytest.mark.parametrize("profile", PROFILES)
def test_pdserve_takes_the_configuration_of_every_profile(profile: str) -> None:
    given = values(profile)["config"]
    config = config_from_dict(given)
    pools = given.get("pools", {})
    assert {name: getattr(config.pools, name) for name in pools} == pools
