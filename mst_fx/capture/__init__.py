"""Nodes of the graph that Dynamo captured, as aten graphs.

In: captured nodes and their example values.
Out: aten graphs, fingerprints of what is alike, sizes taken as fixed.
Imports: core, ops, placement.
"""
