"""Computes a small relation with the installed package and prints the result and the backend as JSON.

The Python of a test environment runs this script, which imports no other test module. It compares the first usable CPU
backend with the reference; tests/relation has the real tests of both.
"""

import json
import sys

import torch

import minilm_kernels as mk

torch.manual_seed(0)
teacher, student = torch.randn(2, 70, 3, 8), torch.randn(2, 70, 3, 4)
status = mk.backend_status()["cpu"]
backend = "cpu" if status == "ready" else "torch"
values, grads = [], []
for name in (backend, "reference"):
    x = student.clone().requires_grad_()
    value = mk.relation_kl(teacher, None, x, None, backend=name)
    value.backward()
    values.append(value.item())
    grads.append(x.grad)
error_value = abs(values[0] / values[1] - 1)
error_grad = ((grads[0] - grads[1]).norm() / grads[1].norm()).item()
assert error_value < 1e-6, error_value
assert error_grad < 1e-5, error_grad
found = {"python": sys.version.split()[0], "torch": torch.__version__, "file": mk.__file__, "backend": backend}
print(json.dumps(found | {"status": status, "value": values[0]}))
if "cpu" in sys.argv[1:] and status != "ready":
    sys.exit(f"the CPU library does not serve: {status}")
