"""The planner decides which regions are looped, and how long their chunks are: a pure function of numbers.

In: Offers, a Timeline, options, a device.
Out: Lengths, or why a region is left alone.
Imports: core, predict.
"""
