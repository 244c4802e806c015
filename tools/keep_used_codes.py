"""Remove the codes that a data set does not use from a VQGAN: a smaller vocabulary for stage 2.

python tools/keep_used_codes.py --model EXPORT --codes CODE_SHARDS --out DIR
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from taming_dist import cli
from taming_dist.data.codes import CodeDataset
from taming_dist.errors import UserError
from taming_dist.models.vqgan import VQGAN, with_codes
from taming_dist.training.export import write_export


def main(argv: Sequence[str] | None = None) -> None:
    """Read the code shards that a VQGAN wrote, and write the VQGAN without the unused codes."""
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="EXPORT")
    parser.add_argument("--codes", required=True, help="code shards of the training set")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new export")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"{options.out} exists: give a new folder with --out")
    model = VQGAN.from_pretrained(options.model)
    dataset = CodeDataset.open(options.codes)
    if not model.wrote(dataset.tokenizer_fingerprint):
        raise UserError(
            f"{options.codes} was not written by {options.model}: give the export that "
            f"tools/tokenize_dataset.py was given"
        )
    shards = (dataset.shard(number) for number in range(dataset.num_shards))
    used = np.unique(np.concatenate([np.unique(shard.codes) for shard in shards]))
    kept = torch.from_numpy(used.astype(np.int64))
    config, state = with_codes(model.config, model.state_dict(), kept)
    write_export(VQGAN, config, state, options.out)
    print(
        f"{len(used)} of {model.config.vocabulary} codes are used; {options.out} has only these. "
        f"Tokenize with it again: the codes have new numbers"
    )


if __name__ == "__main__":
    cli.run(main)
