"""LoRA on any `nn.Module` with Linears; nothing here knows what a language model is."""
