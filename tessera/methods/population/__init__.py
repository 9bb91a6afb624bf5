"""A basis that is learned from many users instead of computed from one gradient."""
