"""A captured graph and its subgraphs -> the regions that can be looped, and what the planner has to know of each.

In: a captured graph, patterns, options.
Out: Surveyed, Offers.
Imports: core, ops, capture, runtime, recognise, bodies, predict, plan, report, verify.
"""
