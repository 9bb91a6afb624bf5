"""The frozen base model: loading it, its shapes, and the places where adapters attach."""
