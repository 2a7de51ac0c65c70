"""What every stage speaks of: options, refusals, the user's lines, sizes and values.

In: options of torch.compile, captured nodes.
Out: Config, Refusal, bytes and sizes; a clean room to trace in.
Imports: nothing of mst_fx.
"""
