"""The build backend: setuptools, and PyTorch's headers where they are not at hand.

The native libraries are compiled against the headers of torch. They are taken from the environment that is installed
into; only where that has no torch yet is torch asked for as a build requirement, because pip installs the requirements
of the package itself after building it.
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
