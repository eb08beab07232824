"""The language model: from a file on disk to logits and text; nothing here knows what an adapter is."""
