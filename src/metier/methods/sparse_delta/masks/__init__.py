"""Which entries of a model's parameters to train: one idea a file, in plain torch, without a tuner.

A score file gives one number an entry; `top_entries` takes the best of all parameters. The others name entries at once.
"""
