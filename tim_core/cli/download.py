"""`tim download`: fetch the released weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .failures import print_result

SUMMARY = "download released weights"

DESCRIPTION = """\
Download the released weights from the Hugging Face Hub: t2i (text to image,
1024 and up), c2i-256 or c2i-512 (classes of ImageNet). The licences are listed
first. Files are checked before they get their names. To resume an interrupted
download, repeat the command."""

EXAMPLES = """\
examples:
  tim download t2i --comfyui ComfyUI
  tim download t2i --mirror                        into the folder tim-t2i
  tim download c2i-512 --comfyui ComfyUI --dry-run

Set HF_ENDPOINT to use another server, HF_TOKEN to use a token in place of
`hf auth login`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", choices=("t2i", "c2i-256", "c2i-512"), help="weights to download")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--comfyui", type=Path, metavar="FOLDER", help="ComfyUI folder; each file goes into its models folder")
    place.add_argument("--to", type=Path, metavar="FOLDER",
                       help="folder to write to; created if it does not exist (default: tim-RELEASE, such as tim-t2i)")
    parser.add_argument("--mirror", action="store_true", help="take gated files from an ungated copy (default: off); the same terms apply")
    parser.add_argument("--dry-run", action="store_true", help="list licences, files and sizes only (default: off)")


def run(args: argparse.Namespace) -> None:
    from ..weights import download

    print(download.terms(args.release, args.mirror), file=sys.stderr)
    to = args.to or (None if args.comfyui else Path(f"tim-{args.release}"))
    downloads = download.plan(args.release, to=to, comfyui=args.comfyui, mirror=args.mirror)
    if args.dry_run:
        for one in downloads:
            print_result(f"{one.target}  {one.size}  {'present' if one.present else one.name}")
        return
    for file, sha256 in download.fetch(downloads, report=lambda line: print_result(line, sys.stderr)):
        print_result(f"{sha256}  {file}")
