"""The loop: the operator in the graph, its derivative, its lowering by Inductor, and what runs it.

In: bodies, literals and operands.
Out: results of all mini-sequences.
Imports: core, kernels.
"""
