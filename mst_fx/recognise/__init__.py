"""The captured graph, read: where regions begin and end, and what is cut or left out in front of them.

In: a captured graph, patterns.
Out: Region or Refusal; copies of the graph with parts replaced.
Imports: core, placement, capture.
"""
