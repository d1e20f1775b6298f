"""Benchmarks: one short file a collective, one harness; see PERFORMANCE.md for what the columns mean."""
