"""Training in the papers' own form: B, or A and B, instead of R."""
