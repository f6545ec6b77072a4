"""Bounds that every engine keeps."""

LOG_FILES, LOG_FILE_SIZE = 3, "10m"
"""Rotation: the most that one container's output takes on the host's disk."""
