"""The names of torch that it does not document for users: all of them, by what they are for; no other file uses one.

A name that a version lacks is an ImportError or AttributeError on first use, which the report tells; `mst_fx/README.md`
has a table: why, the versions run, and what happens without the name.
"""
