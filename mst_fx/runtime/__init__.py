"""The loop: its operator, derivative, lowering by Inductor, and the code that runs it; values that are on the host.

In: bodies, literals and operands.
Out: results over all chunks; what stands in place of logits that are not returned.
Imports: core, kernels.
"""
