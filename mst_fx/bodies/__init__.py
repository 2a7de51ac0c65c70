"""Bodies compute one chunk of a region, forward and backward; the call of their loop replaces the region in the graph.

In: a Region.
Out: Work, the aten bodies of one chunk, the call of the loop.
Imports: core, ops, placement, capture, kernels, runtime, recognise.
"""
