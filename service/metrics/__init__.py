"""What the service measures about itself and reads from the engine, the queue and the store."""
