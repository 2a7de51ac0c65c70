"""The patterns, one a file. Imported as `mst_fx.passes`; every module here is found and loaded by itself."""

if __name__ != "mst_fx.passes":
    raise ImportError("import mst_fx.passes, not passes")
