"""`python -m genscale` is `genscale`."""

import sys

from genscale.cli import main

sys.exit(main())
