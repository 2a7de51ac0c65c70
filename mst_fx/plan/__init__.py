"""Which regions are looped, and how long their mini-sequences are: a pure function of numbers.

In: Offers, a Timeline, options, a device.
Out: Lengths, or why a region is left alone.
Imports: core, predict.
"""
