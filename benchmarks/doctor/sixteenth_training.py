"""The sixteenth set: mistakes of training in general."""
