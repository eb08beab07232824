"""The decoder, with the hub's names; nothing here knows what an adapter is."""
