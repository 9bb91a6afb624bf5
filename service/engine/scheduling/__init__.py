"""The scheduler: which requests run, fairly between tenants, and which of their tokens a step computes."""
