"""A training run, whose story `train.py` tells: where the other parts meet."""
