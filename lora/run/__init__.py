"""Where the four parts meet: a training run, whose story `train.py` tells, and what belongs to the other scripts."""
