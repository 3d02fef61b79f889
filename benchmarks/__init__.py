"""Reproducible measurements: `python -m benchmarks`. Every reported speed comes with its error."""
