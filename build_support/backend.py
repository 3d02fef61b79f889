"""The build backend: setuptools, with torch as a build requirement if MINILM_KERNELS_BUILD=native needs it.

The native libraries are compiled against the headers of the torch that the target environment has. If it has none,
torch becomes a build requirement with MINILM_KERNELS_BUILD=native only, because the download takes gigabytes.
"""

from __future__ import annotations

from typing import Any

import native
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + native.requirements()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + native.requirements()
