"""The `fedvlm` command: a file per subcommand."""
