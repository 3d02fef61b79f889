"""The commands; each module's `register(commands)` adds its parsers with `set_defaults(main=...)`."""
