"""What does a running service do? Load, cold adapters, abuse, soak, and agreement with other tools."""
