"""The commands: each turns a command line into a configuration, and calls one function with it."""
