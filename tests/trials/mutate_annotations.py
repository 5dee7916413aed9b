"""Damage small COCO and VOC sets at random: each is measured as pycocotools does, or refused with the place.

    python tests/trials/mutate_annotations.py --mutations 20000

Exit status 0 where every mutation was; what is not is printed with its seed, which makes the same mutation again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.detection.conftest import base_config
from tests.detection.mutations import check_coco_mutation, check_voc_mutation, write_images

KINDS = {"coco": check_coco_mutation, "voc": check_voc_mutation}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000, help="of each format")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation; the next ones count up")
    parser.add_argument("--formats", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        cfg = base_config()
        for kind in options.formats:
            outcomes = Counter[str]()
            for seed in range(options.seed, options.seed + options.mutations):
                try:
                    outcomes[KINDS[kind](cfg, Path(folder), Path(folder), seed)] += 1
                except Exception as error:
                    outcomes["failed"] += 1
                    if outcomes["failed"] <= 30:
                        place = traceback.extract_tb(error.__traceback__)[-1]
                        told = f"{type(error).__name__} {str(error)[:500]} ({place.name}:{place.lineno})"
                        print(f"{kind}, seed {seed}: {told}", flush=True)
            print(f"{kind}: {dict(outcomes)}", flush=True)
            failures += outcomes["failed"]
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
