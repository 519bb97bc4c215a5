"""Sums as text: a data source in a package of its own."""

from dataclasses import dataclass

from jsonargparse.typing import PositiveInt

import genscale


@dataclass
class Additions(genscale.RowSource):
    """Sums of two numbers, a shard for each first one."""

    most: PositiveInt = 29
    """The largest number."""
    edition: str = ""
    """What tells these sums from other ones."""

    def shards(self):
        return [f"additions-{number:03}" for number in range(self.most + 1)]

    def rows(self, shard):
        one = int(shard.removeprefix("additions-"))
        for other in range(self.most + 1):
            yield {"text": f"{one} + {other} = {one + other}", "even": (one + other) % 2 == 0}

    def fingerprint(self):
        return self.edition
