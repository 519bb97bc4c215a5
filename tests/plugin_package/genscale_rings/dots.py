"""Pictures, and what is no data: sources in a package of its own."""

import io

import numpy as np
from PIL import Image

import genscale


class Dots(genscale.RowSource):
    """Pictures of a dot, whose class is the side it is on."""

    def shards(self):
        return ["left", "right"]

    def validation_shards(self):
        return ["left-validation", "right-validation"]

    def rows(self, shard):
        side, *validation = shard.split("-")
        for number in range(8 if validation else 32):
            pixels = np.zeros((8, 8), np.uint8)
            pixels[number % 8, number // 8 + 4 * (side == "right")] = 255 if validation else 200
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            yield {"image": file.getvalue(), "label": side}


class Drawn(genscale.RowSource):
    """Other rows whenever they are read."""

    def shards(self):
        return ["all"]

    def rows(self, shard):
        yield {"text": f"{np.random.default_rng().random()}"}
