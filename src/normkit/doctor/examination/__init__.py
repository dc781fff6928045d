"""The examination of a model with its weights held still, in three modes."""
