"""The algorithms: one pure function a file, found by itself.

A function takes (size, root) and returns a `Schedule`; the decorator `algorithm` registers it. Every module of this package
is imported here, so that adding an algorithm adds one file and touches none.
"""

from collectives.algorithms.registry import Algorithm, algorithm, find, registered

__all__ = ["Algorithm", "algorithm", "find", "registered"]
