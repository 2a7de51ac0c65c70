"""`python -m mst_fx`: what people ask on a command line.

In: arguments of a command line.
Out: text on the standard output, and an exit status.
Imports: core, predict.
"""
