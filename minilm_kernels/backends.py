"""The names of the operator's backends, for whoever checks a name before torch is imported."""

AUTO = ("cuda", "triton", "cpu", "torch")  # in the order in which backend="auto" tries them
BACKENDS = (*AUTO, "reference")
