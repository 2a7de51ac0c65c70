"""What every stage speaks of: options, refusals, the user's lines, sizes, values, aten ops, walks.

In: options of torch.compile, captured nodes.
Out: Config, Refusal, bytes and sizes, lists of aten ops, nodes that are reached; a clean room to trace in.
Imports: nothing of mst_fx.
"""
