"""python -m tests.ptx.mutate: removes one barrier of a CUDA kernel at a time and reports whether this is detected.

A barrier whose absence is not detected is unnecessary, not reached by the call, or not checked by the emulator.
"""

from __future__ import annotations

import argparse
import re

import torch

from .__main__ import add_arguments, outcome
from .calls import draw, parsed
from .device import Device
from .launch_cuda import cuda_backend


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.mutate", description=__doc__)
    parser.add_argument("kernel", help="name of a kernel, or a part of it, e.g. symmetric_1_2_1_1_1")
    parser.add_argument("--seed", type=int, default=1)
    add_arguments(parser)
    options = parser.parse_args()

    torch.set_num_threads(1)
    call = draw(options.seed, parsed(options.fix))
    device = Device()
    with cuda_backend(device, options.gpu, options.folder) as modules:

        def noticed() -> str:
            _, wrong, findings = outcome(device, call, "cuda")
            return ", ".join(dict.fromkeys([*wrong, *(finding.kind for finding in findings)]))

        print("as it is:", noticed() or "nothing")
        ran = {name for name, *_ in device.launches if options.kernel in name}
        for module in modules.values():
            for name in ran & set(module.entries):
                unreached = {i.line for block in module[name].blocks if not block.reached for i in block.instructions}
                entry, text = module.entries[name], module.text
                end = next((m.start() for m in module.entries.values() if m.start() > entry.end()), len(text))
                for barrier in re.finditer(r"\bbar\.(?:warp\.)?sync\s[^;]*;", text[entry.end() : end]):
                    at = entry.end() + barrier.start()
                    line = text.count("\n", 0, at) + 1
                    if line in unreached:
                        continue
                    module.text = text[:at] + "mov.u32 %r0, 0;".ljust(len(barrier[0])) + text[at + len(barrier[0]) :]
                    module.pop(name, None)
                    print(f"line {line}, without {barrier[0]} {noticed() or 'NOT NOTICED'}", flush=True)
                module.text = text
                module.pop(name, None)


if __name__ == "__main__":
    main()
