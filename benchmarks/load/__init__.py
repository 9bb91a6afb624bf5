"""What the benchmarks of the running service share: a stack of processes, adapters, clients, arrivals."""
