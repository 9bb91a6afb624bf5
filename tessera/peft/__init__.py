"""PEFT's LoRA format, in and out."""
