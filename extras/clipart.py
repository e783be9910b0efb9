"""A small labelled set of real pictures for compare.py, cut from Debian's package openclipart-png (public domain).

    apt install openclipart-png
    python extras/clipart.py clipart                    writes clipart/train/<class>/*.jpg and clipart/val/<class>/*.jpg
    python extras/compare.py --data clipart

A class is a kind of the package's own folders (KINDS), at most 320 pictures of each; every fifth one goes to val/.
Pictures stand on white, 96 pixels at the shorter side.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

KINDS = {  # class -> names of folders that hold it, at any depth
    "animals": ("animals",), "buildings": ("buildings", "building"), "flags": ("flags", "flag"), "food": ("food",),
    "icons": ("icons",), "music": ("music",), "office": ("office",), "people": ("people",), "plants": ("plants",),
    "road_signs": ("road_signs", "roadsigns"), "sports": ("sports", "sport"), "tools": ("tools",),
    "vehicles": ("vehicles", "transportation"),
}
MOST, SIDE = 320, 96                                         # pictures of a class; pixels


def kind_of(file: Path) -> str | None:
    """The class of a file by the innermost folder that names one; None if none does."""
    for folder in reversed(file.parts[:-1]):
        for kind, names in KINDS.items():
            if folder.lower().replace(" ", "_") in names:
                return kind
    return None


def on_white(file: Path) -> Image.Image | None:
    """The picture on white, its shorter side SIDE; None if it cannot be read, is empty, or longer than 1:3."""
    try:
        with Image.open(file) as image:
            image = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    width, height = image.size
    if min(width, height) < SIDE or max(width, height) > 3 * min(width, height) or image.getextrema()[3][1] == 0:
        return None
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    scale = SIDE / min(width, height)
    return page.convert("RGB").resize((round(width * scale), round(height * scale)), Image.LANCZOS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the set is written")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/openclipart/png"), help="the package's files")
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        print(f"clipart.py: error: --source {args.source}: no such folder; apt install openclipart-png",
              file=sys.stderr)
        sys.exit(2)
    if args.folder.exists():
        print(f"clipart.py: error: {args.folder}: is there already; choose another folder", file=sys.stderr)
        sys.exit(2)
    found = {kind: [] for kind in KINDS}
    for file in sorted(args.source.rglob("*.png")):
        if kind := kind_of(file.relative_to(args.source)):
            found[kind].append(file)
    if not any(found.values()):
        print(f"clipart.py: error: --source {args.source}: no PNG files in folders named {', '.join(KINDS)}",
              file=sys.stderr)
        sys.exit(2)
    for kind, pictures in tqdm(found.items(), unit="class"):
        kept = 0
        for i in np.random.default_rng(0).permutation(len(pictures)):        # by chance: neighbours are often alike
            image = on_white(pictures[i]) if kept < MOST else None
            if image:
                out = args.folder / ("val" if kept % 5 == 4 else "train") / kind
                out.mkdir(parents=True, exist_ok=True)
                image.save(out / f"{kept:03d}.jpg", quality=92)
                kept += 1
        print(f"{kind}: {kept} of {len(pictures)} pictures")


if __name__ == "__main__":
    main()
