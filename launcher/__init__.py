"""The host's side: plan, start, watch and stop replicas. Imports only `starling.core` of `starling`, never torch."""
