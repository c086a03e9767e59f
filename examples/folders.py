"""A data format: a folder of pictures for each class, flowers/daisy/1.jpg, flowers/red_rose/2.jpg, ...

    python -m examples.folders train --stage 2 --data flowers.toml
    python -m examples.folders evaluate --data flowers.toml
    python -m examples.folders sample --image PICTURE --task vqa --prompt "what is this?"

A [[source]] of flowers.toml has a name, `format = "folders"` and `images = "flowers"`.
"""

from pathlib import Path

import numpy as np

import train
from formats import FORMATS, Record


class Folders:
    images = 1  # pictures of each sample

    def __init__(self, source):
        self.source = source
        folder = Path(source.path("images"))
        self.names = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*.*"))
        self.lengths = np.array([len(name) for name in self.names])  # bytes of text, roughly

    def read(self, number):
        name = self.names[number]
        where = f"{self.source.name}: {name}"
        label = Path(name).parent.name.replace("_", " ")
        picture = self.source.image(name, where)  # refuses a link that leads out of the folder
        return Record(where, [picture], "what is this?", [label])


FORMATS["folders"] = (Folders, ["vqa", "caption"])

if __name__ == "__main__":
    train.fork()
