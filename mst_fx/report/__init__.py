"""What is told of the decisions.

In: regions, plans, refusals.
Out: Report.
Imports: core, recognise, bodies, plan.
"""
