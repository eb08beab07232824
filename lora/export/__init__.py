"""Publishing: model cards, the receipt of a merge, adapters derived from others, uploads."""
