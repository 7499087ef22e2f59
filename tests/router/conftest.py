"""Fronts that the tests of this folder share; see fronts_world.py."""

from __future__ import annotations

import pytest
from fronts_world import World, running_world, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def module_world(model_folder):
    with running_world(model_folder) as world:
        yield world


@pytest.fixture
def world(module_world: World) -> World:
    """The module's fronts, with a dispatcher as good as new; every job must have ended after it."""
    dispatcher = module_world.dispatcher
    fresh = type(dispatcher)(dispatcher.script, dispatcher.facts.vocab_size, dispatcher.eos)
    dispatcher.__dict__.update(fresh.__dict__)
    module_world.says("the quick brown fox")
    yield module_world
    assert module_world.idle(), "a job was left running"
