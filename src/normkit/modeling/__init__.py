"""A user's model, its batches and its files, handled once for every verb.

batch.py         what a batch is, how a model is called on it, errors that explain it
grad_forward.py  the same, for forwards that differentiate
snapshot.py      modes, buffers, gradients and random states: taken and put back
unwrap.py        the model and the optimizer inside their wrappers
norm_types.py    which modules normalize
pytree.py        tensors in containers
atomic_file.py   a file is the old one or the new one
"""
