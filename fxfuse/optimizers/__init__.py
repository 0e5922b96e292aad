"""Optimizers, their state, param groups and averages of weights, from the original to the packs and back."""
