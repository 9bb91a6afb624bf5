"""A trial of every model when it is loaded: does the engine compute the same as the model?"""
