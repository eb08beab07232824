"""The formulas of the core path, and their fast versions."""
