"""The process of `trapo-train`, `python -m trapo_train` and `torchrun -m trapo_train`.

Nothing of the extra [train] is imported here before it is known to be there: `pip install trapo` alone installs the command, too.
"""

import sys
from typing import NoReturn

from trapo_train.extras import is_installed

NEEDED = ("rich", "yaml", "jinja2", "transformers", "datasets", "matplotlib")


def entry() -> NoReturn:
    """Run one command and exit with its code; with 2 and one line where the packages of the extra are missing."""
    missing = [name for name in NEEDED if not is_installed(name)]
    if missing:
        print(f"trapo-train: error: it needs {', '.join(missing)}: pip install 'trapo[train]'.", file=sys.stderr)
        sys.exit(2)
    from trapo_train.cli import run_and_exit

    run_and_exit()


if __name__ == "__main__":  # not where a worker process imports it
    entry()
