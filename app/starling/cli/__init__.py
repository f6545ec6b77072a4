"""The commands: words of a command line become a configuration, and one call."""
