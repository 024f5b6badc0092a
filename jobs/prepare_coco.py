"""Turn captioned images or prompts into webdataset shards; run it again to go on where it stopped."""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from raydistill.data.pairs import PairSource
from raydistill.data.prepare import prepare
from raydistill.data.prompts import PromptSource
from raydistill.data.sources import CocoSource, Source
from raydistill.errors import DataError, RayDistillError
from raydistill.object_store import require_endpoint

_DETAILS = """\
--coco: annotations/captions_SPLIT.json and the images in SPLIT/ or images/SPLIT/: COCO itself (train2014, val2017;
`train` will do where one year is there) or anything written that way. --prompts: .txt with a prompt a line, or .jsonl
with `caption`, `prompt` or `text` in each object; streamed, so millions will do; without images, for methods that need
none. --pairs: tars of KEY.jpg with KEY.txt or KEY.json as img2dataset writes LAION's; a folder or a glob, local or
s3://. The shards go to --out, a folder or s3://bucket/prefix, with an index.json, written last, that the training
reader needs. Credentials for s3:// come from the environment or ~/.aws.

examples:
  python jobs/prepare_coco.py --coco /data/coco --split train2017 --out /data/coco-512 --image-size 512 \\
      --encode /models/stable-diffusion-v1-5 --workers 8
  python jobs/prepare_coco.py --prompts prompts.txt --out s3://bucket/prompts --encode /models/stable-diffusion-v1-5
  python jobs/prepare_coco.py --pairs 's3://bucket/laion/*.tar' --out s3://bucket/laion-512 --image-size 512 \\
      --max-rejected-share 0.02
"""


def source_of(args: argparse.Namespace) -> Source:
    """What is to be prepared. Raises DataError."""
    for name in ("samples_per_shard", "limit", "image_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.workers < 0:
        raise DataError(f"--workers {args.workers} must not be negative")
    require_endpoint(args.endpoint_url, "--endpoint-url")
    if args.prompts:
        return PromptSource(args.prompts, args.samples_per_shard, args.limit)
    if args.pairs:
        if args.limit:
            raise DataError("--limit is not for --pairs: name fewer tars by a glob")
        return PairSource(absolute(args.pairs), args.endpoint_url)
    return CocoSource(absolute(args.coco), args.split, args.samples_per_shard, args.limit)


def absolute(path: str) -> str:
    """A local path from here on, for processes that run elsewhere."""
    return path if "://" in path else str(Path(path).absolute())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_DETAILS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--coco", metavar="ROOT", help="folder in COCO's layout")
    sources.add_argument("--prompts", metavar="FILE", help=".txt or .jsonl file of prompts")
    sources.add_argument(
        "--pairs", metavar="TARS", help="image-text tars: a folder or a glob, local or s3://"
    )
    parser.add_argument("--split", default="train", help="split to read (default: %(default)s)")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder for the shards, or s3://bucket/prefix"
    )
    parser.add_argument(
        "--endpoint-url", metavar="URL", help="address of an S3 service other than AWS, http://127.0.0.1:9000"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that write shards, under Ray (default: this one)",
    )
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
        help="diffusers pipeline (folder, hub id, builtin:scenes or builtin:scenes-xl) whose latents and text "
        "embeddings are stored too",
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
        source = source_of(args)
        encoder = image_size = None
        if args.encode:
            # diffusers and transformers take seconds to import, which plain images don't need
            from raydistill.models.diffusers_hub import load_pipeline
            from raydistill.runtime.prepare import PipelineEncoder
            from raydistill.runtime.settings import BUILTIN_TEACHERS

            args.encode = str(BUILTIN_TEACHERS.get(args.encode, args.encode))
            pipeline = load_pipeline(args.encode)
            encoder, image_size = PipelineEncoder(pipeline, args.device), pipeline.image_size
        elsewhere = None
        if args.workers:
            from raydistill.runtime.local_cluster import address_to_join, prepare_to_join

            # Ray reads what this sets when it is imported, which takes seconds
            prepare_to_join(address_to_join() if os.environ.get("RAY_ADDRESS") else "")
            from raydistill.runtime.prepare_pool import on_ray

            # a hub id is no folder here
            teacher = absolute(args.encode) if args.encode and Path(args.encode).exists() else args.encode
            elsewhere = on_ray(args.workers, teacher, args.device)
        index = prepare(
            source,
            args.out,
            encoder=encoder,
            elsewhere=elsewhere,
            image_size=args.image_size or image_size,
            array_dtype=args.array_dtype,
            batch_size=args.batch_size,
            max_rejected_share=args.max_rejected_share,
            endpoint_url=args.endpoint_url,
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
    print(f"data.shards={absolute(args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
