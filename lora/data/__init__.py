"""From a file of conversations to micro-batches of tokens."""
