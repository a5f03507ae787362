"""A submission of the competition's size from its parts: seconds and memory to assemble, validate and score it.

100064 rows of about 1200 runs, parts of 512; each stage is a process of its own. The disk's part is in the seconds.

python bench/rows.py [--rows 100064]
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import synthetic
from common import machine, write

from carvana import rle
from carvana.inference.predict import SHARD_SIZE

CARS = 64  # different masks, which the rows repeat
STAGES = {
    "assemble": "submission.assemble(sorted(folder.glob('part-*.csv')), (folder / 'names').read_text().split(), made)",
    "validate": "assert submission.validate(made, submission.Expected(folder / 'sample.csv')).ok",
    "score": "submission.score(made, folder / 'truth.csv')",
}
STAGE = """
import re, sys, time
from pathlib import Path
from carvana import submission
folder = Path(sys.argv[1])
made, began = folder / "made.csv.gz", time.perf_counter()
{}
held = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]  # of this program alone
print(time.perf_counter() - began, int(held) / 1e3)
"""


def make(folder: Path, rows: int) -> None:
    """Parts, a sample and a truth."""
    texts = [rle.encode(mask) for mask in synthetic.masks(CARS)]
    names = [f"{i // 16:012x}_{i % 16 + 1:02d}.jpg" for i in range(rows)]
    for number, first in enumerate(range(0, rows, SHARD_SIZE)):
        shard = range(rows)[first : first + SHARD_SIZE]
        table(folder / f"part-{number:05d}.csv", [(names[i], texts[i % CARS]) for i in shard])
    table(folder / "truth.csv", ((name, texts[(i + 1) % CARS]) for i, name in enumerate(names)))
    table(folder / "sample.csv", ((name, "1 1") for name in names))
    (folder / "names").write_text("\n".join(names))


def table(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    with path.open("w") as file:
        file.write("img,rle_mask\n")
        file.writelines(f"{name},{text}\n" for name, text in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100064)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.rows)
        for name, work in STAGES.items():
            command = [sys.executable, "-c", STAGE.format(work), folder]
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, held = map(float, ended.stdout.split())
            found[name] = {"seconds": round(seconds, 1), "memory_mb": round(held)}
            print(name, found[name], flush=True)
        found["file_mb"] = round((Path(folder) / "made.csv.gz").stat().st_size / 1e6)
    print(machine())
    write("rows", found | {"rows": options.rows})


if __name__ == "__main__":
    main()
