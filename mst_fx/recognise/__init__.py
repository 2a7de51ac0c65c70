"""Patterns find regions in the captured graph: where they begin and end, and what is cut or left out before them.

In: a captured graph, patterns.
Out: Region or Refusal; copies of the graph with parts replaced.
Imports: core, ops, placement, capture.
"""
