"""Executes the PTX of the package's GPU kernels on the CPU, without a GPU. See README.md in this folder."""
