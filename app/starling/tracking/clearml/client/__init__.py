"""A ClearML server as this project uses it: bounded calls, tasks for trainings, datasets.

ClearML's own SDK retries for hours, and only SIGKILL ends a call; so only `sdk_process` imports the SDK, and runs in a
separate process that can be killed.
"""
