"""The build backend: setuptools, and PyTorch's headers where a native build was asked for and they are not at hand.

The native libraries are compiled against the headers of torch, taken from the environment that is installed into. Where
that has no torch, torch becomes a build requirement only for MINILM_KERNELS_BUILD=native: it is gigabytes.
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
