"""Training in the papers' own form: of B, or of A and B, instead of R."""
