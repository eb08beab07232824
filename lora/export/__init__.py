"""What leaves the house: model cards, receipts, derived adapters, uploads."""
