"""Hypothesis profiles: `default` is quick (and repeatable where CI is set), `soak` serves `make soak`, and runs what is marked so."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, max_examples=25, derandomize="CI" in os.environ)
settings.register_profile(
    "soak", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--hypothesis-profile") != "soak":
        left_out = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
