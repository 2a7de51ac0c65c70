"""The loop: the operator in the graph, its derivative, its lowering by Inductor, and the code that runs it.

In: bodies, literals and operands.
Out: results over all chunks; what stands in place of logits that are not returned.
Imports: core, kernels.
"""
