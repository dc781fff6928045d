"""Fold torch modules: trace a forward, search, edit a copy, compare, keep a ledger."""
