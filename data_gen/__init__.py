"""Programs that write conversations as JSONL."""
