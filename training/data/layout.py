"""Labels and splits of pictures, from the folders they are in.

The first level of folders is the label. If that level has two or more split folders (SPLITS, also as train2017 or
test_images), or nothing else, the next level is the label; other folders of that level are training pictures without
labels, and files next to the split folders are left out. Folders of annotations next to split folders or to a folder of
images are left out. A single folder that contains everything else, as in many archives, is skipped.
"""

import re

# Names of split folders. "val" belongs to "train" if there is a test folder; otherwise it is "test".
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
SUFFIX = re.compile(r"[-_ ]?(\d+|set|images?|data)$")  # train2017, test_images
IMAGES = {"images", "image", "imgs", "img", "jpegimages"}
ANNOTATIONS = {"labels", "annotations", "masks", "segmentation", "segmentations"}

Folder = tuple[str, ...]  # parts of a folder's path inside the source; () for the source itself


def layout(folders: set[Folder]) -> tuple[dict[Folder, tuple[str | None, str]], str]:
    """Label (or None) and split ("train" or "test") of the files in each folder, without the folders that are left out;
    and a sentence on what was taken for what, empty if the folders are labels.

    folders  each folder that contains a file
    """
    short, left_out = _without_annotations(folders)
    depth = 0  # of the current level; each level above it is a single folder
    while True:
        level = {folder[depth] for folder in short.values() if len(folder) > depth}
        splits = _splits(level)
        if splits or len(level) != 1:
            break
        depth += 1
    if not splits:
        return {folder: (_at(parts, depth), "train") for folder, parts in short.items()}, _sentence({}, set(), left_out)
    left_out |= {name for name in level if name.lower() in ANNOTATIONS}
    found: dict[Folder, tuple[str | None, str]] = {}
    for folder, parts in short.items():
        name = _at(parts, depth)
        if name in splits:
            found[folder] = _at(parts, depth + 1), splits[name]
        elif name and name not in left_out:
            found[folder] = None, "train"
    return found, _sentence(splits, level - splits.keys() - left_out, left_out)


def _at(parts: Folder, depth: int) -> str | None:
    return parts[depth] if len(parts) > depth else None


def _splits(level: set[str]) -> dict[str, str]:
    """The split of each split folder of a level; empty if its folders are labels."""
    named = {name: SPLITS.get(name.lower()) or SPLITS.get(SUFFIX.sub("", name.lower())) for name in level}
    splits = {name: split for name, split in named.items() if split}
    if len(splits) < 2 and len(splits) < len(level):
        return {}
    validation = "train" if "test" in splits.values() else "test"
    return {name: validation if split == "val" else split for name, split in splits.items()}


def _without_annotations(folders: set[Folder]) -> tuple[dict[Folder, Folder], set[str]]:
    """The folders without those of annotations, and the names of these.

    Where images and annotations lie next to each other, the folder of images is left out of the path: of YOLO's
    train/images and train/labels remains train.
    """
    below: dict[Folder, set[str]] = {}
    for folder in folders:
        for depth, name in enumerate(folder):
            below.setdefault(folder[:depth], set()).add(name)
    pairs = {above for above, names in below.items() if _is_pair({name.lower() for name in names})}
    short, left_out = {}, set()
    for folder in folders:
        in_pair = [depth for depth in range(len(folder)) if folder[:depth] in pairs]
        if aside := {folder[depth] for depth in in_pair if folder[depth].lower() in ANNOTATIONS}:
            left_out |= aside
        else:
            short[folder] = tuple(name for depth, name in enumerate(folder) if depth not in in_pair)
    return short, left_out


def _is_pair(names: set[str]) -> bool:
    return bool(names & IMAGES) and bool(names & ANNOTATIONS) and names <= IMAGES | ANNOTATIONS


def _sentence(splits: dict[str, str], beside: set[str], left_out: set[str]) -> str:
    """splits: split of each split folder; beside: folders without labels"""
    taken = {
        "for training": {name for name, split in splits.items() if split == "train"},
        "for testing": {name for name, split in splits.items() if split == "test"},
        "for training without labels": beside,
        "left out": left_out,
    }
    return "; ".join(f"{purpose}: {', '.join(sorted(names))}" for purpose, names in taken.items() if names)
