"""Messages to token ids and back: tokenizer, chat template, conversation."""
