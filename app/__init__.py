"""The trainer that runs in the container: train, search, track. Never imports `launcher` or Docker."""

__version__ = "0.1.0"
