"""What fetches tools or builds a site of its own runs where it is asked for: make deploy-check."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "deploy" in str(config.getoption("-m")):
        return
    skip = pytest.mark.skip(reason="make deploy-check runs it")
    for item in items:
        if item.get_closest_marker("deploy") is not None:
            item.add_marker(skip)
