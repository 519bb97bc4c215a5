"""`python -m genscale` is `genscale`."""

from genscale.cli import start

start()
