"""Memory between forward and backward: keep less, and measure what is kept.

recipes           how to compute an output again from what is kept anyway
block             the blocks with hooks on saved tensors
less_memory       the public block; `int8_activations` rounds what has no recipe
saved_memory      count the bytes
recomputable      an output that carries the block to the next layer
"""
