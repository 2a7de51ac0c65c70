"""Bytes and milliseconds of a region and of a step, as functions of the length of a mini-sequence.

In: Work, bodies, the rest of the graph.
Out: RegionMemory, RegionCost, Extent, Timeline.
Imports: core, ops, placement, kernels, runtime, recognise, bodies.
"""
