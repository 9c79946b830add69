"""Reconstruction: the weights of a unit are trained until it gives what the unit of the float model gives."""
