"""The option `verify` runs a region on random numbers, looped and as captured.

In: a Region, its Work and the call of its loop.
Out: Verified or Refusal.
Imports: core, ops, placement, capture, recognise, bodies.
"""
