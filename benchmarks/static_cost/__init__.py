"""Static cost of the GPU kernels: instructions per ordered pair, counted in machine code, without a GPU."""

from . import cli, table


def register(commands) -> None:
    """Adds the subcommands `static` and `costs`."""
    cli.register(commands)
    table.register(commands)


__all__ = ["register"]
