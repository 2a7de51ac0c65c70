"""`python -m mst_fx explain package.module:function`, and `python -m mst_fx doctor`."""

from __future__ import annotations

import sys

from mst_fx.command.arguments import main

if __name__ == "__main__":
    sys.exit(main())
