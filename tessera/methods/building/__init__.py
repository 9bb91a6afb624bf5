"""The parts that several methods share: targets, calibration, gradients, decompositions, a memory bound."""
