"""Measuring a loss: its inputs, time, memory and correctness, and the record of a measurement."""
