"""One step of the model: from a plan to tensors, through the model, to the tokens that result."""
