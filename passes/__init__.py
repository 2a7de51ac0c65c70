"""The patterns, one in each file. Import them as `mst_fx.passes`, which finds and loads every module here."""

if __name__ != "mst_fx.passes":
    raise ImportError("import mst_fx.passes, not passes")
