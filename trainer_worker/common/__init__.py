"""What every part of the worker uses: commands, the model lock, metrics and health."""
