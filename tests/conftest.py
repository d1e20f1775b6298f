"""Hypothesis profiles: `default` is quick (and repeatable where CI is set), `soak` serves `make soak`."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, max_examples=25, derandomize="CI" in os.environ)
settings.register_profile(
    "soak", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")
