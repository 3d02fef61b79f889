"""Executes the PTX of the package's GPU kernels on the CPU, without a GPU: see README.md here."""
