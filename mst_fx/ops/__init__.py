"""Ops that stand in traced graphs for what no aten op says.

In: tensors.
Out: tensors; each op with its derivative.
Imports: nothing of mst_fx.
"""
