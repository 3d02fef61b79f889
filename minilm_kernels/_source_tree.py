"""Warns when a checkout of the sources hides an installation of the package.

Python started in a checkout imports `minilm_kernels` from there. The native libraries of a checkout may be missing or
old, and then the losses are 4 to 12 times slower than those of the installation.
"""

import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

_NAME = "minilm_kernels"


def warn_if_it_shadows(root: Path) -> None:
    """Warns if `root`, the checkout that is being imported, hides an installation.

    There is no warning if the installation is an editable one of `root` itself, or if PYTHONPATH names the checkout.
    """
    asked_for = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root in (Path(entry).resolve() for entry in asked_for if entry):
        return
    installed = _installation()
    if installed is not None and installed != root:
        warnings.warn(
            f"{_NAME} is imported from the source tree {root}, not from the installation in {installed}. To use the "
            f"installation, start Python in another folder. To use the source tree without this warning, run "
            f"`pip install -e {root}` or add it to PYTHONPATH.",
            stacklevel=3,  # the line that imports the package
        )


def _installation() -> Path | None:
    """The folder of the first installation on `sys.path`: site-packages, or the checkout of an editable installation.

    `importlib.metadata` would find the same folder, but takes 20 to 40 ms to import.
    """
    for entry in sys.path:
        for metadata in Path(entry).glob(f"{_NAME}-*.dist-info"):
            with suppress(OSError, ValueError, KeyError, TypeError):  # pip writes it only for folders and URLs
                found = json.loads((metadata / "direct_url.json").read_text(encoding="utf-8"))
                if found["dir_info"]["editable"]:
                    return Path(unquote(found["url"].removeprefix("file://"))).resolve()
            return metadata.parent
    return None
