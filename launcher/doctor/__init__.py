"""`launcher doctor`: check everything that `up` needs; each finding names its remedy."""
