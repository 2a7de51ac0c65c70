"""Ops of our own in traced graphs, where no aten op does the same.

In: tensors.
Out: tensors; each op with its derivative.
Imports: core.
"""
