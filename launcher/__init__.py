"""The host's side: plan, start, watch and stop replicas. Of `starling` it imports `starling.core` only; never torch."""
