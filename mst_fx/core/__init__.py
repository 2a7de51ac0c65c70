"""All stages share these: options, refusals, the user's source lines, sizes, values, aten ops, graph walks.

In: options of torch.compile, captured nodes.
Out: Config, Refusal, bytes and sizes, lists of aten ops, nodes that a walk reaches; a clean room to trace in.
Imports: nothing of mst_fx.
"""
