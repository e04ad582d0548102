"""pytest in several processes, each with a share of the tests, where pytest-xdist is missing.

    python -m tools.gpu.sharded_tests JOBS [pytest's arguments]

Compilation takes most of the time of a GPU test, and a GPU machine has idle cores.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

NO_TESTS = 5  # pytest's exit status
LAST_LINE = re.compile(r"(\d+) (failed|passed|skipped|errors?|xfailed)")


def run(jobs: int, arguments: list[str]) -> int:
    """The worst exit status; prints the output of each process, then the sums of their counts."""
    outputs = [tempfile.TemporaryFile("w+") for _ in range(jobs)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments, f"--share={n}/{jobs}"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for n, output in enumerate(outputs)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        waits = [pool.submit(process.wait) for process in processes]
        try:
            codes = [w.result() for w in waits]
        except KeyboardInterrupt:  # the processes got it too, and print their summaries
            codes = [w.result() for w in waits]
    total = Counter()
    for output in outputs:
        output.seek(0)
        text = output.read()
        print(text)
        total.update({word: int(n) for n, word in LAST_LINE.findall(text[-300:])})
    print(", ".join(f"{n} {word}" for word, n in total.items()), f"in {jobs} processes")
    return max((code for code in codes if code != NO_TESTS), default=NO_TESTS, key=abs)


if __name__ == "__main__":
    raise SystemExit(run(int(sys.argv[1]), sys.argv[2:]))
