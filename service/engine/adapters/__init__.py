"""Adapters and bases on the device: slots, loads, the host cache, and the layers that apply them."""
