"""Talking: sampling, sessions, several adapters, scores."""
