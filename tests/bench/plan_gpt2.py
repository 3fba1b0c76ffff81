"""Plan GPT-2 small at 60 % of its retained-all peak on an A100: gap, solve seconds, memory beyond torch itself.

    python -m tests.bench.plan_gpt2 [--budget 60%] [--out results.json]

Memory is the peak resident size of a process that plans, less that of one that only imports the libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tests.bench.machine import machine

HERE = Path(__file__).resolve().parent
_IMPORTS = "import resource, torch, transformers.models.gpt2.modeling_gpt2, torch._functorch.aot_autograd\n"
_RSS = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"


def measure(budget: str) -> dict[str, object]:
    """One object: the planner's own numbers and the memory of its process."""
    code = (
        _IMPORTS + "import contextlib, json, sys\n"
        "from planner.inputs.workload import Workload\nfrom planner.pipeline import plan_workload\n"
        "from planner.report.summary import plan_object\n"
        "w = Workload.load(sys.argv[1]).model_copy(update={'budget': sys.argv[2]})\n"
        "print(json.dumps(plan_object(plan_workload(w))))\n" + _RSS
    )
    planned = _python(code, str(HERE / "gpt2_small.yaml"), budget)
    base = _python(_IMPORTS + _RSS)
    return {
        **json.loads(planned[0]),
        "process_bytes_beyond_imports": int(planned[1]) - int(base[0]),
        **machine("torch", "transformers", "pulp", "highspy"),
    }


def _python(code: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=HERE.parents[1]
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip().splitlines()


def main() -> None:
    """Print the measurement, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="60%")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = json.dumps(measure(options.budget), indent=2)
    print(result)
    if options.out is not None:
        options.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
