"""What a loop over a region computes, forward and backward, and how its call is put into the graph.

In: a Region.
Out: Work, the aten bodies of one mini-sequence, the call of the loop.
Imports: core, ops, placement, capture, kernels, runtime, recognise.
"""
