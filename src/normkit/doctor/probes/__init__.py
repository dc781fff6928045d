"""Measurements taken while a model runs: hooks on layers, weights and the loop."""
