"""A training run: where the four parts meet. `train.py` tells its story."""
