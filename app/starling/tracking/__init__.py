"""Tracking beside the trainer: it appends events to a file, a bridge process feeds them to a tracker.

The trainer imports `events` and `process` only; the tracker's library is imported by the bridge alone.
"""
