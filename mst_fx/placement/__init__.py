"""Where each value of an aten graph lies across the chunks, and what runs before, in and after the loop.

In: an aten graph and the placeholder that carries the tokens.
Out: Placements, Stages.
Imports: core, ops.
"""
