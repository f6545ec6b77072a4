"""How candidates are proposed: one module a way, behind one protocol (`base.Sampler`)."""
