"""More of what ``torture_store`` does now and then: so many damages to one finished store, each of
which ``verify`` must name; and pairs of clients that build one store at the same time, of which at
most one may be refused, in a sentence, and the store must be as one client alone makes it.
``python tests/torture_pairs.py --damages 2000 --pairs 50``"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import tree_bytes
from torture_store import DAMAGE, Client, damage

from occfeat_targets.demo_world import make_demo_world

SHARES = {"flip": 1.0, "truncate": 0.09, "exchange": 0.08, "lose": 0.03, "add": 0.03}
"""Of the damages, flips; of the other kinds so many beside them."""


def damages(n, seed, url):
    """By kind, how many were tried and what was not named."""
    rng = random.Random(seed)
    for kind in DAMAGE:
        tries = round(n * SHARES[kind])
        wrong = [text for _ in range(tries) if (text := damage(kind, rng, str(url)))]
        print(f"{kind}: {tries} tried, {len(wrong)} not named", *wrong[:5], flush=True)
        yield from wrong


def pair(rng, world, url, reference):
    """What happened to two clients: how many were refused, and whether all is right."""
    first = Client(world, url, "--workers", rng.choice("02"))
    time.sleep(rng.uniform(0, 2))
    more = ["--overwrite"] if rng.random() < 0.3 else []
    second = Client(world, url, "--workers", rng.choice("02"), *more)
    ends = [second.end(), first.end()]
    said = "".join(text for _, text in ends)
    refused = sum(status != 0 for status, _ in ends)
    told = sum("is building" in text for status, text in ends if status)
    if tree_bytes(url) != reference:
        said += Client(world, url, "--workers", "0").end()[1]
    right = tree_bytes(url) == reference and "Traceback" not in said
    return refused, "" if right and told == refused < 2 else f"{url}: {ends}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    world, url = folder / "world", folder / "targets.zarr"
    make_demo_world(world, scenes=2, samples=2, seed=0)
    status, said = Client(world, url, "--workers", "0").end()
    assert status == 0, said
    wrong, reference = [*damages(asked.damages, asked.seed, url)], tree_bytes(url)
    rng, refused = random.Random(asked.seed), Counter()
    for number in range(asked.pairs):
        n, text = pair(rng, world, folder / f"{number}.zarr", reference)
        refused[n] += 1
        wrong += [text] if text else []
        print(f"pair {number + 1}/{asked.pairs}: {'WRONG ' + text if text else 'ok'}", flush=True)
    print(f"{refused[1]} of {asked.pairs} second clients were told to wait; {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
