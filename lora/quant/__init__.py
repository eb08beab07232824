"""Weights packed into 4 to 8 bits: one format a file, and the Linear that computes with any of them."""
