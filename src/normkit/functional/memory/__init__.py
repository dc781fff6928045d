"""Memory between forward and backward: keep less, and measure what is kept.

recipes           recompute an output from tensors that are kept anyway
block             context managers with hooks on saved tensors
less_memory       the public block; `int8_activations` rounds tensors without a recipe
saved_memory      count the bytes
recomputable      an output that carries the block to the next layer

A forward registers its recipe in `functional.autograd`, `run`.
"""
