"""Measurements that anyone can repeat: `python -m benchmarks`. No speed is reported without its error."""
