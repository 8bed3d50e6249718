"""The tools room: one short file for each subcommand of `orchestrate`. Each parses, calls a function and prints."""
