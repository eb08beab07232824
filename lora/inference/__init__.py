"""A model that answers: sampling, several adapters, answers side by side."""
