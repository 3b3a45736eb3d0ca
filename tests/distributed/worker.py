"""One of several processes: runs every case, in the same order as the others, and writes down what went wrong.

Run as `python worker.py RANK PROCESSES FOLDER`. The processes are started once for all cases, because starting them is
what takes time.
"""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import cases_of_failures  # noqa: F401
import cases_of_functions  # noqa: F401
import cases_of_losses  # noqa: F401
import torch
import torch.distributed as dist
from batches import CASES


def main(rank: int, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=processes)
    failures: dict[str, str | None] = {}
    for name, function in CASES.items():
        failures[name] = None
        try:
            function()
        except Exception:
            failures[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.barrier()
    dist.destroy_process_group()  # whose threads would otherwise now and then abort the process at its end


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
