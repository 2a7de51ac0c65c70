"""What the kernels that a compiler makes of an aten graph hold at once, and may overwrite.

In: aten graphs with fake values.
Out: bytes alive; the same graph with its values in another order.
Imports: core.
"""
