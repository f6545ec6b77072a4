"""A ClearML server as this project uses it: bounded calls, tasks for trainings, datasets.

ClearML's own SDK retries for hours, and a call of it can be ended only by SIGKILL; so nothing here imports it but
`sdk_process`, which runs in a process of its own that can be killed.
"""
