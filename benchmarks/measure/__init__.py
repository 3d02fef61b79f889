"""Measures a loss: inputs, time, memory, correctness, and the record of a measurement."""
