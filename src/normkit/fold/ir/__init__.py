"""The network as a graph of values and nodes, and the gauges that relate two of them.

Both front ends (a torch module that ran once, an ONNX file) are read into this graph.
"""
