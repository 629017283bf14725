"""Runs a program and tells how much memory it took at most.

Linux begins the count of a process at what its parent had when it started it, and a process that
runs tests may have gigabytes. So a small one stands between the two.
"""

import json
import subprocess
import sys

BETWEEN = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=sys.stderr)
print(json.dumps([done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""


def run_measured(command, folder):
    """Returns the peak in bytes and what was said, of a program that ended well."""
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN, *map(str, command)],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    status, peak_bytes = json.loads(done.stdout)
    assert status == 0, done.stderr
    return peak_bytes, done.stderr
