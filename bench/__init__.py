"""Benchmarks: one short file a collective, one harness; see PERFORMANCE.md for the method and the columns."""
