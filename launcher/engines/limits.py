"""Bounds that every engine keeps."""

STOP_GRACE_S = 60
"""How long a trainer may take to save when it is asked to end: by `launcher stop`, by `docker stop`, or by an engine that goes
down with its machine. A large model on a slow disk takes a while."""

LOG_FILES, LOG_FILE_SIZE = 3, "10m"
"""Rotation: the most that one container's output takes on the host's disk."""

LOG_BYTES = 30 * 1024**2
"""The same for Podman, which keeps one file and starts it anew when it is full."""

SCRATCH_BYTES = 1024**2
"""What Podman's own writable folders besides /tmp may hold."""

CDI_GPU = "nvidia.com/gpu={}"
"""A GPU's name in the Container Device Interface, by index, UUID or MIG id."""
