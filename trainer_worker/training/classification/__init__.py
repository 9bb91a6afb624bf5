"""Training of classifiers: r × r cores together with a classification head, for many users at once."""
