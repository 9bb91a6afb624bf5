"""The algebra that a single method uses: LoRA-DA's guidance and LoRAM's sines."""
