"""Hyperparameter search by any number of workers on one study."""
