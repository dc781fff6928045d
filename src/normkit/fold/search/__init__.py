"""The search for changes of gauge that remove batch norms from a graph."""
