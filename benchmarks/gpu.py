"""The measurements of docs/speed.md on a GPU, in pieces of less than nine minutes.

First the ceilings: how fast the GPU copies, and multiplies matrices. Then steps of pre-training at the largest batch
that fits, eager and compiled, each option of the decoder, studies of different contrasts in groups and packed,
and peers beside them; fine-tuning with nnU-Net's augmentation and ours; prediction; the reader. Each part is a line of
the file after `-o` once it is done. What is there is not measured again, so that the same command goes on after an
interruption; it prints all tables at its end.

    python benchmarks/gpu.py -o gpu.jsonl                        # makes volumes for the parts that need a dataset
    python benchmarks/gpu.py -o gpu.jsonl -d 505 -p Short        # takes those of a dataset
    python benchmarks/gpu.py -o smoke.jsonl --device cpu --smoke # tiny sizes, in half a minute: does every part run?
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_parts import Bench, Part, parts

from nnunet_vit_mae.storage.files import write_file

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the file lacks, and print the tables; exits with 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="output", type=Path, required=True, help="file with a line for each part")
    parser.add_argument("-d", dest="dataset", help="a preprocessed dataset")
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=530, help="after which no part begins that may take longer")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, and no compiler")
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose names begin so, in this order")
    chosen = parser.parse_args(arguments)
    os.environ |= {"nnUNet_compile": "f"}
    with TemporaryDirectory() as folder:
        os.environ |= {"nnUNet_results": folder}  # for the logs of nnU-Net's trainers
        bench = Bench(
            device=torch.device(chosen.device),
            smoke=chosen.smoke,
            folder=Path(folder),
            dataset=chosen.dataset,
            plans=chosen.plans,
            configuration=chosen.configuration,
        )
        every = list(parts(smoke=chosen.smoke))
        wanted = [part for beginning in chosen.only for part in every if part.name.startswith(beginning)]
        failed = measure(bench, wanted, chosen.output, chosen.seconds)
    print(markdown(read(chosen.output)))
    if failed:
        raise SystemExit(f"These parts failed: {', '.join(failed)}")


def measure(bench: Bench, parts: Sequence[Part], file: Path, seconds: float) -> list[str]:
    """Add the rows of all parts that the file lacks, as far as the time allows; returns the parts that failed."""
    end, failed = time.monotonic() + seconds, []
    for part in parts:
        done = {row["part"]: row for row in read(file)}
        if part.name in done:
            continue
        if part.missing():
            print(f"{part.name}: left out, {part.needs} is not installed", flush=True)
            continue
        if time.monotonic() + part.seconds > end:
            print(f"{part.name}: left for another run", flush=True)
            continue
        started = time.monotonic()
        try:
            cells = part.measure(bench.knowing(done))
        except Exception:  # noqa: BLE001 (time on a GPU is short: the other parts come first, then the exit code)
            traceback.print_exc()
            failed.append(part.name)
            continue
        finally:
            tidy()
        rows = [*read(file), {"part": part.name, "table": part.table, "cells": cells}]
        write_file("".join(f"{json.dumps(row)}\n" for row in rows), file)
        print(f"{part.name}: {time.monotonic() - started:.1f} s", flush=True)
    return failed


def tidy() -> None:
    """Give back the memory of a part, and forget what was compiled for it."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def read(file: Path) -> list[Row]:
    """Return the rows of all parts that are done."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def markdown(rows: Sequence[Row]) -> str:
    """Return a table for each kind of part."""
    text = []
    for table in dict.fromkeys(row["table"] for row in rows):
        cells = [row["cells"] for row in rows if row["table"] == table]
        text += [f"\n### {table}\n", f"| {' | '.join(cells[0])} |", "|---" * len(cells[0]) + "|"]
        text += [f"| {' | '.join(map(in_words, row.values()))} |" for row in cells]
    return "\n".join(text)


def in_words(value: Any) -> str:
    """Return a cell: three digits of a measurement, and a dash for what this device does not tell."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
