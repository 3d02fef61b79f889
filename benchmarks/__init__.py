"""Measurements that anyone can rerun: `python -m benchmarks`. One JSON line each, never speed without error."""
