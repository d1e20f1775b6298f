import os

from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=40, derandomize=bool(os.environ.get("CI")))
settings.register_profile("soak", deadline=None, max_examples=3000)
settings.load_profile("default")
