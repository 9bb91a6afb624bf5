"""The API's side of the engine: starting it, connecting to it, and the outputs that come back."""
