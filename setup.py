"""Entry point of the build. The metadata is in pyproject.toml; native libraries from csrc/ will be declared here."""

from setuptools import setup

setup()
