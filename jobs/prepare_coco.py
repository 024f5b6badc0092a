"""Turn a COCO-format folder into webdataset shards; run it again to go on where it stopped."""

import argparse
import logging
import sys
import time
from pathlib import Path

from raydistill.data.prepare import prepare_coco
from raydistill.errors import RayDistillError

_DETAILS = """\
The folder holds annotations/captions_SPLIT.json and the images in SPLIT/ or images/SPLIT/: COCO itself
(train2014, val2017; `train` will do where one year is there) or anything written that way. The shards go to
--out with an index.json, written last, that the training reader needs. Upload the whole folder to read it
from s3://.

examples:
  python jobs/prepare_coco.py --coco /data/coco --split train2017 --out /data/coco-512 --image-size 512 \\
      --encode /models/stable-diffusion-v1-5
  python jobs/prepare_coco.py --coco /data/coco --split val2017 --out /tmp/try --image-size 64 --limit 100
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_DETAILS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coco", required=True, metavar="ROOT", help="folder in COCO's layout")
    parser.add_argument("--split", default="train", help="split to read (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the shards; local")
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=1000,
        metavar="N",
        help="images in a shard (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="edge of the square that images are cropped and resized to (default: the teacher's with "
        "--encode, otherwise images stay as they are)",
    )
    parser.add_argument(
        "--encode",
        metavar="TEACHER",
        help="diffusers pipeline (folder or hub id) whose latents and text embeddings are stored too",
    )
    parser.add_argument("--device", default="cpu", help="where the teacher encodes (default: %(default)s)")
    parser.add_argument(
        "--array-dtype",
        choices=("float16", "float32"),
        default="float16",
        help="what latents and embeddings are stored as (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="images encoded at once (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images only, by image id")
    parser.add_argument(
        "--max-rejected-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of images that may be left out: no caption or unreadable (default: %(default)s)",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    started = time.monotonic()
    try:
        encoder = image_size = None
        if args.encode:
            # diffusers and transformers take seconds to import, which plain images don't need
            from raydistill.models.diffusers_hub import load_pipeline
            from raydistill.runtime.prepare import PipelineEncoder

            pipeline = load_pipeline(args.encode)
            encoder, image_size = PipelineEncoder(pipeline, args.device), pipeline.image_size
        index = prepare_coco(
            args.coco,
            args.split,
            args.out,
            samples_per_shard=args.samples_per_shard,
            encoder=encoder,
            image_size=args.image_size or image_size,
            limit=args.limit,
            array_dtype=args.array_dtype,
            batch_size=args.batch_size,
            max_rejected_share=args.max_rejected_share,
        )
    except RayDistillError as error:
        print(f"raydistill: error: {error}", file=sys.stderr)
        return 2
    size = sum(shard.bytes for shard in index.shards)
    left_out = ", ".join(f"{count} {reason}" for reason, count in index.rejected.items())
    print(
        f"{index.num_samples} samples in {len(index.shards)} shards, {size / 2**20:.1f} MiB, left out: "
        f"{left_out or 'none'}; {time.monotonic() - started:.1f} s"
    )
    print(f"data.shards={Path(args.out).absolute()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
