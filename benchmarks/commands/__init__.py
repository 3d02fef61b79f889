"""The commands. `register(commands)` of each module adds the module's parsers with `set_defaults(main=...)`."""
