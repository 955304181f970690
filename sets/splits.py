"""Divide a folder of images into train/ and test/, as `--dataset folder` reads them.

    python data.py split --data-dir DIR                              # writes DIR-split
    python data.py split --data-dir DIR --groups "patient([0-9]+)"   # each patient on one side

DIR has one sub-folder per class. Of each class a share goes to test, but at least --least images
and at most half of the class. Groups are never divided: images of one patient or one film are so
alike that a test on them says too little. Files with the same content are one group.
"""
import os
import re
import shutil
from pathlib import Path

import numpy as np

import disk
from runtime import Parser, UserError, integer, number, print_next
from sets.readers import as_lists, files_by_class


def groups_of(files, text, data_dir):
    """The group of each file, a list of texts. Raises UserError for a file without one.

    files: paths from data_dir on. text: a regular expression, the name of a CSV, or None.
    """
    if text is None:
        return [disk.sha256(Path(data_dir) / file) for file in files]
    if text.endswith(".csv"):
        given = disk.read_pairs(text, "--groups")
        found = [given.get(file, given.get(Path(file).name)) for file in files]
    else:
        try:
            matches = [re.search(text, file) for file in files]
        except re.error as e:
            raise UserError(f"--groups {text}: no regular expression ({e})") from e
        found = [m and m[min(1, m.re.groups)] for m in matches]     # what is in (), or all of it
    if lacking := [file for file, group in zip(files, found) if not group]:
        raise UserError(f"--groups {text}: {len(lacking):,} of {len(files):,} files have no group, "
                        f"the first is {lacking[0]}; leave --groups out where there are none")
    return found


def choose_test(labels, groups, share, least, seed):
    """Which images are for the test, (N,) bool: whole groups, drawn at random.

    One class after another, the smallest first. labels (N,), groups: N texts. Of a class with n
    images, max(share n, least) are wanted, at most n / 2; a group that would take more than n / 2
    of any class is passed over.
    """
    n = np.bincount(labels)
    wanted = np.minimum(np.maximum(np.round(share * n), least), n // 2)
    names, group = np.unique(groups, return_inverse=True)
    sizes = np.zeros((len(names), len(n)), int)         # images of each group in each class
    np.add.at(sizes, (group, labels), 1)
    test = np.zeros(len(names), bool)
    got = np.zeros(len(n), int)
    order = np.random.RandomState(seed).permutation(len(names))
    for c in np.argsort(n, kind="stable"):
        for g in order:
            fits = sizes[g, c] and not test[g] and (got + sizes[g] <= n // 2).all()
            if fits and got[c] < wanted[c]:
                test[g] = True
                got += sizes[g]
    return test[group]


def write_split(out, root, files, record):
    """Link the files of root into out/train and out/test; copy them where links are not possible.

    files: {"train": [...], "test": [...]}. split.json is first, so that the same command goes on
    after a stop. Returns "hard links" or "copies". Raises UserError for another split's folder.
    """
    if out.exists() and any(out.iterdir()) and disk.read_json(out / "split.json") != record:
        raise UserError(f"--out {out}: it holds something else, or another split of {root}; to use "
                        f"that one, say --data-dir {out}; for this one, name another folder")
    disk.write_json(out / "split.json", record)
    how = "hard links"
    for side, names in files.items():
        for name in names:
            target = out / side / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                continue
            try:
                os.link(root / name, target)
            except OSError:         # another disk, or a file system without links
                shutil.copy2(root / name, target)
                how = "copies"
    return how


def make_parser():
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", required=True, help="the images, one sub-folder per class")
    parser.add_argument("--share", type=number(above=0, high=0.5), default=0.2,
                        help="of each class that is for the test (default: 0.2)")
    parser.add_argument("--least", type=integer(1), default=10,
                        help="test images of a class at least, but at most half of it "
                        "(default: 10)")
    parser.add_argument("--groups", metavar="TEXT",
                        help="what a file belongs to: a regular expression for its path in DIR, of "
                        "which the part in () counts; or the name of a .csv with file,group in "
                        "each line (default: every file by itself)")
    parser.add_argument("--seed", type=integer(0, 2**32 - 1), default=0,
                        help="of the draw (default: 0)")
    parser.add_argument("--out", help="default: DIR-split")
    return parser


def main(words):
    """Choose, write, and print a table of the classes."""
    args = make_parser().parse_args(words)
    root = Path(os.path.abspath(args.data_dir))
    out = Path(args.out or f"{root}-split")
    classes = files_by_class(root)
    if len(classes) < 2:
        raise UserError(f"--data-dir {root}: has {len(classes)} sub-folders with images; it must "
                        "hold one per class, at least two")
    paths, labels, names = as_lists(classes)
    files = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
    groups = np.array(groups_of(files, args.groups, root))
    test = choose_test(labels, groups, args.share, args.least, args.seed)
    for c, name in enumerate(names):
        if not test[labels == c].any():
            raise UserError(f"--groups: class {name} would have no test image; its "
                            f"{(labels == c).sum()} images are of {len(set(groups[labels == c]))} "
                            "group(s), and half of them must stay for training")
    sides = {"train": [file for file, held_out in zip(files, test) if not held_out],
             "test": [file for file, held_out in zip(files, test) if held_out]}
    how = write_split(out, root, sides, {"data_dir": str(root), "groups": args.groups,
                                         "test": sides["test"], "num": len(files)})
    print(f"{'train':>7} {'test':>7}  class")
    for c in np.argsort(-np.bincount(labels), kind="stable"):
        print(f"{(labels[~test] == c).sum():7,} {(labels[test] == c).sum():7,}  {names[c]}")
    print(f"wrote {out}: {len(files):,} files, of {len(set(groups)):,} group(s), as {how}")
    print_next("train.py", "--dataset", "folder", "--data-dir", out)
