"""Adapters of peft: LoRA on a shrunk model, and trained rows as peft's trainable tokens, alone or beside LoRA."""
