"""Bytes and milliseconds of a region and of a step, as functions of the chunk length.

In: Work, bodies, the rest of the graph.
Out: RegionMemory, RegionCost, Extent, Timeline.
Imports: core, ops, placement, kernels, runtime, recognise, bodies.
"""
