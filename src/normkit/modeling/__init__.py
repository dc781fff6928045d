"""A user's model, its batches and its files, handled once for every verb."""
