"""From examples to batches: encoding, the validation split, pairs, the order of an epoch, padded rows."""
