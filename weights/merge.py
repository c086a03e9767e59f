"""A run of --tune lora as a plain model that needs nothing else: W + B A in the place of W.

python -m weights.merge out/lora                  # writes out/lora/merged
python -m weights.merge out/lora --out FOLDER
"""

import sys
from pathlib import Path

import lora
import weights
from support.commands import Parser, run
from support.errors import BadInput
from text import Tokenizer


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", help="the run's folder, or one of its checkpoints")
    parser.flag("--out", str, "where to write; default: merged, in that folder")
    args = parser.parse_args(argv)
    out = Path(args.out or Path(args.run, "merged"))
    if out.exists():
        raise BadInput(f"{out}: is there already; remove it, or name another --out")
    path = weights.find(args.run)
    model = weights.load(path)
    if not isinstance(model, lora.LoraInfMLLM):
        raise BadInput(f"{path}: has no low-rank matrices to merge; name a run of --tune lora")
    preset = weights.read_checked(path, "config.json")["training"].get("preset")
    weights.save(out, lora.merged(model), Tokenizer(path), {"preset": preset})
    print(f"{out}: a plain model; python sample.py --ckpt {out} --image PICTURE")


if __name__ == "__main__":
    sys.exit(run(main))
