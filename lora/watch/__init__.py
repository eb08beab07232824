"""A run as a page: a server in a process of its own, which reads the run's files and nothing else."""
