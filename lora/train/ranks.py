"""One process."""

from contextlib import contextmanager


class Team:
    rank, size, main = 0, 1, True

    def share(self, indices, lengths):
        return indices

    def part(self, batches):
        return batches

    def total(self, numbers):
        return list(numbers)

    def reduce(self, parameters, numbers):
        return numbers


@contextmanager
def team_of(device):
    yield Team()
