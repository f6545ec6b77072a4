"""`launcher doctor`: one look at everything that `up` will need, each finding with its remedy."""
