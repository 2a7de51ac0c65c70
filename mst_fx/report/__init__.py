"""The report tells the user every decision.

In: regions, plans, refusals.
Out: Report.
Imports: core, recognise, bodies, plan.
"""
