"""A model of a compiler's kernels for an aten graph: what they hold at once, and what they can overwrite.

In: aten graphs with fake values.
Out: bytes alive; the same graph with its values in another order.
Imports: core.
"""
