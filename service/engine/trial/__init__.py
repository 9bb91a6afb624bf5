"""A trial of every model when it is loaded: does the engine compute what the model computes?"""
