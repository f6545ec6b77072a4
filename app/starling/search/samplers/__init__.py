"""Samplers that propose candidates: one module per method, with one protocol (`base.Sampler`)."""
