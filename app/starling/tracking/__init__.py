"""Tracking outside the trainer: the trainer appends events to a file, and a bridge process sends them to a tracker.

The trainer imports only `events` and `process`; only the bridge imports the library of a tracker.
"""
