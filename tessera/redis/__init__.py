"""The connection to Redis or Valkey, every key, and the server that runs when no URL is given."""
