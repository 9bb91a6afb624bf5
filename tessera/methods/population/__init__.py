"""The method `population`: a basis that is learned over many users."""
