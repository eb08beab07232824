"""A model and its adapters over HTTP: answers of several at once, an OpenAI-compatible endpoint, and a page."""
