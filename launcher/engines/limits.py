"""Limits that every engine applies."""

STOP_GRACE_S = 60
"""Time for a trainer to save after SIGTERM from `launcher stop`, `docker stop`, or an engine that shuts down. A large
model on a slow disk takes a while."""

LOG_FILES, LOG_FILE_SIZE = 3, "10m"
"""Log rotation, which limits the space of one container's output on the host's disk."""

LOG_BYTES = 30 * 1024**2
"""The same limit for Podman, which keeps one file and truncates it when it is full."""

SCRATCH_BYTES = 1024**2
"""The size limit of Podman's own writable folders besides /tmp."""

CDI_GPU = "nvidia.com/gpu={}"
"""A GPU's name in the Container Device Interface, by index, UUID or MIG id."""
