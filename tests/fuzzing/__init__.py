"""Random programs, compiled with mst_fx beside eager: drawn, run, shrunk."""
