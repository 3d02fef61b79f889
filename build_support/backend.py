"""The build backend: setuptools, with torch as a build requirement if MINILM_KERNELS_BUILD=native needs it.

The native libraries are compiled against torch's headers, which are taken from the target environment. If it has no
torch, torch (gigabytes) becomes a build requirement for MINILM_KERNELS_BUILD=native only.
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
