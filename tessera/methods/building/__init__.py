"""What the methods share: targets, calibration, gradients, decompositions and a bound on memory."""
