"""Decide how to share and size LoRA adapters."""
