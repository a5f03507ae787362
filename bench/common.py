"""What every measurement needs: the machine in words, an allocator that is not in the way, and a result file."""

import json
import os
import platform
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def tame_allocator() -> None:
    """Start this program again with the allocator settings that `carvana run` gives to its notebooks."""
    from carvana.pipeline import tame_allocator

    if "MALLOC_TOP_PAD_" not in os.environ:
        tame_allocator()
        os.execv(sys.executable, [sys.executable, *sys.argv])


def machine() -> str:
    """Processor or GPU, cores and torch, in one line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}"
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = dict(line.replace("\t", "").split(": ", 1) for line in reversed(lines) if ": " in line)
    has = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    name = facts.get("model name", platform.machine())
    return f"{name}, {os.cpu_count()} cores, {' '.join(has) or 'no bf16'}, torch {torch.__version__}"


def write(name: str, found: dict) -> None:
    """Write bench/results/NAME.json, with the machine and the command, of folders elsewhere the names alone."""
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)])
    text = json.dumps({"machine": machine(), "command": command} | found, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
