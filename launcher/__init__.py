"""The host's side: plan, start, watch and stop replicas. Never imports `app` or torch."""

__version__ = "0.1.0"
