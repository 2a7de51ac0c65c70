"""Captured nodes are lowered to aten graphs.

In: captured nodes and their example values.
Out: aten graphs, fingerprints of nodes and regions that are alike, sizes taken as fixed.
Imports: core, ops, placement.
"""
