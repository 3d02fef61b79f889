"""What is measured: a suite takes the options of the command line and yields rows, the most valuable first."""

from . import accuracy, inference, loss, memory, step

SUITES = {"loss": loss, "memory": memory, "step": step, "inference": inference, "accuracy": accuracy}
