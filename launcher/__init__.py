"""The host's side: plan, start, watch and stop replicas. Of `app` it imports `app.core` only; never torch."""

__version__ = "0.1.0"
